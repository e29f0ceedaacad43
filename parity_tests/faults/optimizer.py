"""Mistakes in an optimizer's step, as changes of its definition in plain numpy."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests.traces.optimizer_step import RIGHT, Moments, Rule, is_decoupled, step

Group = Mapping[str, Any]


class OptimizerFault(NamedTuple):
    """A mistake: its name, the mistake in words, and the rule with it."""

    name: str
    words: str
    rule: Rule


def _settings(**changes: Any) -> Rule:
    """Other settings in every group."""
    return RIGHT._replace(group=lambda own, *_: dict(own) | changes)


def _decay(change: Callable[[Group, float, int], float]) -> Rule:
    """Another weight decay, of a group, the largest of all groups, and the axes of the parameter."""

    def group(own: Group, every: list[Group], axes: int) -> Group:
        largest = max(g.get("weight_decay", 0.0) for g in every)
        return dict(own) | {"weight_decay": change(own, largest, axes)}

    return RIGHT._replace(group=group)


def _weight_decay(own: Group) -> float:
    return own.get("weight_decay", 0.0)


def _counted(by: int) -> Rule:
    """Another number of steps in the corrections of bias."""
    return RIGHT._replace(
        step=lambda kind, group, count, *arrays: step(kind, group, max(count + by, 1), *arrays)
    )


def _adam(
    change: Callable[[np.ndarray, np.ndarray, float, float, Any], np.ndarray],
) -> Rule:
    """Another Adam: the direction of both moments, their corrections of bias, and eps."""

    def wrong(
        kind: str, group: Group, count: int, w: np.ndarray, g: np.ndarray, moments: Moments
    ) -> np.ndarray:
        if kind == "SGD":
            return step(kind, group, count, w, g, moments)
        number = w.dtype.type
        rate, decay = number(group["lr"]), number(_weight_decay(group))
        if is_decoupled(kind, group):
            w = w * (1 - rate * decay)
        else:
            g = g + decay * w
        beta1, beta2 = (number(beta) for beta in group["betas"])
        first = beta1 * moments.first + (1 - beta1) * g
        second = beta2 * moments.second + (1 - beta2) * np.square(g)
        corrections = 1 - beta1 ** number(count), 1 - beta2 ** number(count)
        return w - rate * change(first, second, *corrections, number(group["eps"]))

    return RIGHT._replace(step=wrong)


def _decay_of_the_other_adam(kind: str, group: Group, *arguments: Any) -> np.ndarray:
    if kind != "SGD":
        kind = "Adam" if is_decoupled(kind, group) else "AdamW"
        group = dict(group) | {"decoupled_weight_decay": kind == "AdamW"}
    return step(kind, group, *arguments)


def _decay_without_rate(
    kind: str, group: Group, count: int, w: np.ndarray, g: np.ndarray, moments: Moments
) -> np.ndarray:
    w = w * (1 - w.dtype.type(_weight_decay(group)))
    return step(kind, dict(group) | {"weight_decay": 0.0}, count, w, g, moments)


def _sgd(momentum: Callable[[float, np.ndarray, np.ndarray], np.ndarray]) -> Rule:
    def wrong(
        kind: str, group: Group, count: int, w: np.ndarray, g: np.ndarray, moments: Moments
    ) -> np.ndarray:
        number = w.dtype.type
        if kind != "SGD":
            return step(kind, group, count, w, g, moments)
        g = g + number(_weight_decay(group)) * w
        return w - number(group["lr"]) * momentum(
            number(group.get("momentum", 0.0)), moments.first, g
        )

    return RIGHT._replace(step=wrong)


def _forgotten() -> Rule:
    """The moments before the step are taken for zeros."""

    def wrong(
        kind: str, group: Group, count: int, w: np.ndarray, g: np.ndarray, moments: Moments
    ) -> np.ndarray:
        zeros = Moments(*(np.zeros_like(moment) for moment in moments))
        return step(kind, group, count, w, g, zeros)

    return RIGHT._replace(step=wrong)


def _own_norm(gradient: np.ndarray, _: float, limit: float | None) -> np.ndarray:
    norm = float(np.sqrt(np.sum(np.square(gradient, dtype=np.float64))))
    number = gradient.dtype.type
    return gradient if limit is None else gradient * number(min(1.0, limit / (norm + 1e-6)))


def _by_value(gradient: np.ndarray, _: float, limit: float | None) -> np.ndarray:
    return gradient if limit is None else np.clip(gradient, -limit, limit)


def faults() -> Iterator[OptimizerFault]:
    """All mistakes."""
    yield OptimizerFault(
        "decay_of_norms",
        "weight decay is applied to norms and biases",
        _decay(lambda own, largest, axes: largest if axes < 2 else _weight_decay(own)),
    )
    yield OptimizerFault(
        "decay_of_all",
        "weight decay is applied to every parameter",
        _decay(lambda own, largest, _: largest),
    )
    yield OptimizerFault("decay_dropped", "weight decay is left out", _decay(lambda *_: 0.0))
    yield OptimizerFault(
        "decay_of_matrices",
        "weight decay is left out for norms and biases",
        _decay(lambda own, _, axes: 0.0 if axes < 2 else _weight_decay(own)),
    )
    yield OptimizerFault(
        "decay_coupled",
        "weight decay is added to the gradient, or should be (Adam for AdamW)",
        RIGHT._replace(step=_decay_of_the_other_adam),
    )
    yield OptimizerFault(
        "decay_not_times_rate",
        "weight decay is not multiplied by the learning rate",
        RIGHT._replace(step=_decay_without_rate),
    )
    yield OptimizerFault(
        "bias_correction",
        "moments are not corrected for bias",
        _adam(lambda m, v, c1, c2, eps: m / (np.sqrt(v) + eps)),
    )
    yield OptimizerFault(
        "bias_correction_of_second",
        "the second moment is not corrected for bias",
        _adam(lambda m, v, c1, c2, eps: m / c1 / (np.sqrt(v) + eps)),
    )
    yield OptimizerFault(
        "bias_correction_of_first",
        "the first moment is not corrected for bias",
        _adam(lambda m, v, c1, c2, eps: m / (np.sqrt(v / c2) + eps)),
    )
    yield OptimizerFault(
        "adam_eps_inside_root",
        "eps of Adam is inside the root",
        _adam(lambda m, v, c1, c2, eps: m / c1 / np.sqrt(v / c2 + eps)),
    )
    yield OptimizerFault(
        "adam_eps_before_correction",
        "eps of Adam is added before the correction of bias",
        _adam(lambda m, v, c1, c2, eps: m / c1 / ((np.sqrt(v) + eps) / np.sqrt(c2))),
    )
    yield OptimizerFault(
        "adam_root_dropped",
        "Adam divides by the second moment, not by its root",
        _adam(lambda m, v, c1, c2, eps: m / c1 / (v / c2 + eps)),
    )
    for by in (1, -1):
        words = "one too many" if by > 0 else "one too few"
        yield OptimizerFault("adam_step", f"Adam counts {words} steps", _counted(by))
    yield OptimizerFault("adam_step", "Adam counts from the first step again", _counted(-(1 << 62)))
    yield OptimizerFault("adam_moments", "moments of earlier steps are lost", _forgotten())
    for eps in (1e-8, 1e-6, 1e-5, 1e-10, 1e-15, 0.0):
        yield OptimizerFault("adam_eps", f"eps of Adam is {eps:g}", _settings(eps=eps))
    for betas in ((0.9, 0.999), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.95, 0.95)):
        yield OptimizerFault("adam_betas", f"betas of Adam are {betas}", _settings(betas=betas))
    yield OptimizerFault(
        "adam_betas_swapped",
        "betas of Adam are swapped",
        RIGHT._replace(group=lambda own, *_: dict(own) | {"betas": own.get("betas", (0, 0))[::-1]}),
    )
    yield OptimizerFault(
        "clip_dropped", "the gradient is not clipped", RIGHT._replace(clip=lambda g, *_: g)
    )
    yield OptimizerFault(
        "clip_by_value",
        "the gradient is clipped by value, not by norm",
        RIGHT._replace(clip=_by_value),
    )
    yield OptimizerFault(
        "clip_of_each",
        "each parameter's gradient is clipped by its own norm",
        RIGHT._replace(clip=_own_norm),
    )
    yield OptimizerFault(
        "momentum_dampened",
        "the gradient is dampened by 1 - momentum",
        _sgd(lambda b, m, g: b * m + (1 - b) * g),
    )
    yield OptimizerFault(
        "momentum_nesterov", "momentum is Nesterov's", _sgd(lambda b, m, g: g + b * (b * m + g))
    )
    yield OptimizerFault("momentum_dropped", "momentum is left out", _sgd(lambda b, m, g: g))
