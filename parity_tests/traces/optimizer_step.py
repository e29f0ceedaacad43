"""A recorded optimizer step against its definition, from the recorded gradients.

Source: the documentation of `torch.optim.SGD`, `Adam` and `AdamW`.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from parity_tests.report.programs.checkpoint import Checkpoint, read
from parity_tests.traces.residuals import Residual, residual
from parity_tests.traces.trace import MANIFEST, Trace

_UNKNOWN = ("amsgrad", "dampening", "maximize", "nesterov")
_CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


class Moments(NamedTuple):
    """Before the step; zeros at the first one."""

    first: np.ndarray
    second: np.ndarray


class Rule(NamedTuple):
    """How an optimizer steps; to put a fault into it, replace a field.

    Attributes:
        clip: the gradient that the step uses, of the gradient, the factor that clips all, and max_norm.
        group: the settings for a parameter with so many axes, of its own and of all groups.
        step: the parameter after the step, in the dtype of its operands.
    """

    clip: "Callable[[np.ndarray, float, float | None], np.ndarray]"
    group: "Callable[[Mapping[str, Any], list[Mapping[str, Any]], int], Mapping[str, Any]]"
    step: "Callable[[str, Mapping[str, Any], int, np.ndarray, np.ndarray, Moments], np.ndarray]"


def step_residuals(
    trace: Trace,
    checkpoint: Checkpoint,
    dtype: np.dtype,
    rule: Rule | None = None,
    only: Container[str] | None = None,
) -> Iterator[Residual]:
    """Residuals of every parameter's update; none where no step was recorded.

    Args:
        dtype: of the parameters.
        rule: default: the right one.
        only: names of parameters; default: all.

    Raises:
        ValueError: an optimizer, or a setting of one, that is not known; a damaged manifest.
    """
    stated = trace.manifest.get("optimizer")
    if stated is None:
        return
    _require_known(stated, trace)
    kind = stated["class"]
    scale, rule = _clip(trace, stated), RIGHT if rule is None else rule
    for own in stated["groups"]:
        for name in own["parameters"]:
            gradient = f"{name}.grad"
            if only is not None and name not in only:
                continue
            if gradient not in trace.stored or name not in checkpoint.stored:
                continue
            if f"{name}.stepped" not in trace.stored:
                raise ValueError(f"{trace.folder}: {name}.stepped: missing")
            before = read(checkpoint, name, dtype)
            after = trace.read(f"{name}.stepped").astype(np.float64)
            updates, group = [], rule.group(own, stated["groups"], before.ndim)
            for working in (np.dtype(np.float64), np.dtype(np.float32)):
                g = rule.clip(trace.read(gradient).astype(working), scale, stated.get("max_norm"))
                moments = _moments(trace, name, g)
                count, weight = stated["step"] + 1, before.astype(working)
                stepped = rule.step(kind, group, count, weight, g, moments)
                rounded = stepped if working == np.float64 else stepped.astype(dtype)
                updates.append(rounded.astype(np.float64) - before.astype(np.float64))
            exact, rounded = updates
            rows = len(exact) if exact.ndim > 1 else 1
            yield residual(
                name,
                "step",
                after - before.astype(np.float64),
                exact,
                rounded,
                eps=float(ml_dtypes.finfo(dtype).eps),
                rows=rows,
            )


def _require_known(stated: Mapping[str, Any], trace: Trace) -> None:
    where, kind = f"{trace.folder / MANIFEST}: optimizer", stated.get("class")
    if kind not in ("SGD", "Adam", "AdamW"):
        raise ValueError(f"{where}: found {kind}, expected SGD, Adam or AdamW")
    groups = stated.get("groups")
    needed = {"lr", "parameters"} if kind == "SGD" else {"lr", "parameters", "betas", "eps"}
    if not isinstance(stated.get("step"), int) or not isinstance(groups, list):
        raise ValueError(f"{where}: expected a step and groups")
    for group in groups:
        if not isinstance(group, dict) or not needed <= group.keys():
            raise ValueError(f"{where}: expected {', '.join(sorted(needed))} of each group")
        for setting in _UNKNOWN:
            if group.get(setting):
                raise ValueError(f"{where}: {setting}: steps with it cannot be checked")


def _clip(trace: Trace, stated: Mapping[str, Any]) -> float:
    """What gradients are multiplied by."""
    if stated.get("max_norm") is None:
        return 1.0
    squares = sum(
        float(np.sum(np.square(trace.read(array), dtype=np.float64)))
        for array in trace.stored
        if array.endswith(".grad")
    )
    return min(1.0, stated["max_norm"] / (squares**0.5 + _CLIP_EPS))


def _moments(trace: Trace, name: str, gradient: np.ndarray) -> Moments:
    arrays = []
    for moments in (("exp_avg", "momentum_buffer"), ("exp_avg_sq",)):
        present = [f"{name}.{m}" for m in moments if f"{name}.{m}" in trace.stored]
        values = trace.read(present[0]) if present else np.zeros_like(gradient)
        arrays.append(values.astype(gradient.dtype))
    return Moments(*arrays)


def step(
    kind: str,
    group: Mapping[str, Any],
    step: int,
    weight: np.ndarray,
    gradient: np.ndarray,
    moments: Moments,
) -> np.ndarray:
    """The parameter after the step, in the dtype of its operands."""
    number = weight.dtype.type
    rate, decay = number(group["lr"]), number(group.get("weight_decay", 0.0))
    if is_decoupled(kind, group):
        weight = weight * (1 - rate * decay)
    else:
        gradient = gradient + decay * weight
    if kind == "SGD":
        momentum = number(group.get("momentum", 0.0))
        return weight - rate * (momentum * moments.first + gradient)
    beta1, beta2 = (number(beta) for beta in group["betas"])
    first = beta1 * moments.first + (1 - beta1) * gradient
    second = beta2 * moments.second + (1 - beta2) * np.square(gradient)
    root = np.sqrt(second) / np.sqrt(1 - beta2 ** number(step)) + number(group["eps"])
    return weight - rate / (1 - beta1 ** number(step)) * first / root


def is_decoupled(kind: str, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is kept out of the gradient. torch's AdamW is an Adam with this setting."""
    return kind == "AdamW" or bool(group.get("decoupled_weight_decay"))


RIGHT = Rule(
    clip=lambda gradient, scale, _: gradient * gradient.dtype.type(scale),
    group=lambda own, _, __: own,
    step=step,
)
