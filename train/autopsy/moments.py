"""Whether Adam's moments can be those of one history of gradients.

m and v are weighted sums of the same gradients, of g and of g^2. By Cauchy-Schwarz, whatever the gradients
were,

    m^2 <= v (1 - beta1)^2 / (1 - beta2) / (1 - beta1^2 / beta2)        if beta1^2 < beta2

for every element: one that exceeds this was not made by the optimizer.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from llama_jax.numerics.matmul import working_dtype
from train.autopsy.noise import compare
from train.model.training_state import is_adam
from train.options import OptimizerOptions
from train.program.per_layer import is_stacked

# elements whose squares are smaller are left alone: float32 has few digits for them
_SMALLEST = 1e-30
# a second moment is not called too large for less than this factor
_FACTOR = 10.0


class Moments(NamedTuple):
    """Sums over the elements of one parameter; of each layer where layers are stacked.

    impossible: elements beyond the bound. ratio: the largest of m^2 / v by the bound.
    second: the sum of v. size: elements.
    """

    impossible: np.ndarray
    ratio: np.ndarray
    second: np.ndarray
    size: int


class Finding(NamedTuple):
    """A second moment that is out of line.

    name: of the parameter. layer: its number, None where layers are not stacked.
    reason: in words. surprise: infinite for what cannot be.
    """

    name: str
    layer: int | None
    reason: str
    surprise: float


def largest_ratio(options: OptimizerOptions) -> float | None:
    """The largest m^2 / v that there can be; None where there is no bound."""
    beta1, beta2 = options.beta1, options.beta2
    if beta1**2 >= beta2 or beta2 >= 1:
        return None
    return (1 - beta1) ** 2 / (1 - beta2) / (1 - beta1**2 / beta2)


def adam_moments(opt_state: Any, options: OptimizerOptions) -> dict[str, Moments]:
    """The moments of every parameter that Adam updates, by its name; none without Adam."""
    limit = largest_ratio(options)
    nodes = [node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node)]
    found: dict[str, Moments] = {}
    for node in nodes:
        flat, _ = jax.tree_util.tree_flatten_with_path(node.mu)
        for (path, first), second in zip(flat, jax.tree.leaves(node.nu), strict=True):
            name = keystr(path, simple=True, separator=".")
            layers = first.shape[0] if is_stacked(path) else 0
            sums = jax.device_get(_sums(first, second, limit or math.inf, stacked=bool(layers)))
            size = first.size // max(layers, 1)
            impossible, ratio, total = (np.atleast_1d(np.asarray(value)) for value in sums)
            found[name] = Moments(impossible, ratio, total, size)
    return found


def _sums_of(first: Any, second: Any, limit: float, *, stacked: bool) -> Any:
    axes = tuple(range(int(stacked), first.ndim))
    wide = working_dtype(first.dtype)
    # rounding to bfloat16, at random, moves both by up to a part in 128, step after step
    slack = 1.001 if first.dtype != jnp.bfloat16 else 4.0
    first, second = first.astype(wide), second.astype(wide)
    squares = jnp.square(first)
    ratio = squares / jnp.maximum(second, _SMALLEST) / limit
    counted = squares > _SMALLEST
    ratio = jnp.where(counted, ratio, 0)
    impossible = jnp.sum((ratio > slack) | (second < 0), axis=axes, dtype=jnp.int32)
    return impossible, jnp.max(ratio, axis=axes), jnp.sum(second, axis=axes)


_sums = jax.jit(_sums_of, static_argnames="stacked")


def out_of_line(
    moments: dict[str, Moments],
    gradients: Sequence[dict[str, Any]],
    recorded: Sequence[float] | None,
    options: OptimizerOptions,
    ignored: set[tuple[str, int | None]],
) -> list[Finding]:
    """Second moments that no gradients can have left, or that are far above those that follow.

    Args:
        moments: of one state.
        gradients: norms, by parameter and layer, of the steps after that state, before clipping but by
            the factor of the clipping.
        recorded: the gradient's norm in every step up to the state, clipped; None if not all are known.
        ignored: parameters that get no gradient at all.
    """
    findings = [
        Finding(
            name,
            layer,
            f"{int(group.impossible[index]):,} of {group.size:,} elements have a first moment whose square "
            f"is up to {_times(group.ratio[index])} what their second moment allows",
            math.inf,
        )
        for name, group in moments.items()
        for index, layer in _layers(name, group)
        if group.impossible[index]
    ]
    named = {finding[:2] for finding in findings}
    if recorded is not None:
        weights = (1 - options.beta2) * options.beta2 ** np.arange(len(recorded) - 1, -1, -1)
        most = float(weights @ np.square(np.asarray(recorded, float)))
        for name, group in moments.items():
            for index, layer in _layers(name, group):
                total = float(group.second[index])
                if total > 1.01 * most and (name, layer) not in named:
                    reason = (
                        f"its sum is {_times(total / max(most, _SMALLEST))} what the recorded norms of all "
                        "gradients allow"
                    )
                    findings.append(Finding(name, layer, reason, math.inf))
    return findings or _too_large(moments, gradients, ignored)


def _too_large(
    moments: dict[str, Moments],
    gradients: Sequence[dict[str, Any]],
    ignored: set[tuple[str, int | None]],
) -> list[Finding]:
    """Second moments far above the squares of the gradients that follow, beside other parameters'."""
    if not gradients:
        return []
    logs = {}
    for name, group in moments.items():
        squares = np.mean([np.square(np.atleast_1d(step[name])) for step in gradients], axis=0)
        for index, layer in _layers(name, group):
            after, before = float(squares[index]), float(group.second[index])
            ratio = before / after if after > 0 else 0.0
            if (name, layer) not in ignored and 0 < ratio < math.inf:
                logs[name, layer] = math.log(ratio)
    findings = []
    for (name, layer), value in logs.items():
        others = [log for group, log in logs.items() if group != (name, layer)]
        comparison = compare(value, others, floor=0.3)
        factor = math.exp(value)
        if comparison is not None and comparison.unusual and factor > _FACTOR:
            reason = f"it is {_times(factor)} the squared gradients of the steps that follow"
            findings.append(Finding(name, layer, reason, comparison.surprise))
    return findings


def repaired(opt_state: Any, findings: Sequence[Finding], typical: dict[str, np.ndarray]) -> Any:
    """The state with the second moments of `findings` as recent gradients would have left them.

    Args:
        typical: the mean square of an element of the gradient, by parameter and layer.
    """
    wrong = {(finding.name, finding.layer) for finding in findings}

    def mend(path: Any, first: Any, second: Any) -> Any:
        name = keystr(path, simple=True, separator=".")
        layers = second.shape[0] if is_stacked(path) else 1
        mask = np.array(
            [(name, number if is_stacked(path) else None) in wrong for number in range(layers)]
        )
        if not mask.any():
            return second
        shape = (layers, *[1] * (second.ndim - 1)) if is_stacked(path) else ()
        level = np.asarray(typical[name], np.float64).reshape(shape)
        mended = np.maximum(np.square(np.asarray(first, np.float64)), level).astype(second.dtype)
        return np.where(mask.reshape(shape), mended, second)

    def mend_node(node: Any) -> Any:
        if not is_adam(node):
            return node
        return node._replace(nu=jax.tree_util.tree_map_with_path(mend, node.mu, node.nu))

    return jax.tree.map(mend_node, opt_state, is_leaf=is_adam)


def _layers(name: str, group: Moments) -> list[tuple[int, int | None]]:
    """Index and number of each layer; (0, None) where layers are not stacked."""
    if ".layers." not in f".{name}":
        return [(0, None)]
    return [(number, number) for number in range(len(group.second))]


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if 10 <= factor < 1e6 else f"{factor:.3g} times"
