"""An exponential moving average of the parameters, kept in the optimizer's state."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from llama_jax.numerics.matmul import working_dtype


class AverageState(NamedTuple):
    """The average after `steps` updates, like the parameters in float32 (float64 for float64)."""

    steps: Int[Array, ""]
    average: Any
    inner: optax.OptState


def averaged(
    rule: optax.GradientTransformationExtraArgs, decay: float
) -> optax.GradientTransformationExtraArgs:
    """`rule`, with the mean of the parameters after each update, weighted by decay^(updates since then).

    The weights add up to 1 from the first update on, as in `optax.ema(decay, debias=True)`: the initial
    parameters have no part in it.
    """

    def init(params: Any) -> AverageState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, working_dtype(leaf.dtype)), params)
        return AverageState(jnp.zeros((), jnp.int32), zeros, rule.init(params))

    def update(
        updates: Any, state: AverageState, params: Any = None, **extra: Any
    ) -> tuple[Any, AverageState]:
        updates, inner = rule.update(updates, state.inner, params, **extra)
        steps = state.steps + 1

        def move(average: Array, leaf: Array) -> Array:
            # 1 - decay^steps; the power itself has few digits left where decay is close to 1
            total = -jnp.expm1(steps.astype(average.dtype) * math.log(decay))
            return average + (1 - decay) / total * (_rounded(leaf, average.dtype) - average)

        average = jax.tree.map(move, state.average, optax.apply_updates(params, updates))
        return updates, AverageState(steps, average, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _rounded(leaf: Array, dtype: Any) -> Array:
    """The leaf in a wider dtype, as it is stored: XLA may leave out the rounding of a sum in bfloat16."""
    wide = leaf.astype(dtype)
    if leaf.dtype == dtype:
        return wide
    info = jnp.finfo(leaf.dtype)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def is_average(node: Any) -> bool:
    """Whether a node of an optimizer's state holds an average of the parameters."""
    return isinstance(node, AverageState)
