"""An optimizer whose next update can be scaled, and its gradient clipped, without compiling anew."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from llama_jax.numerics.matmul import working_dtype
from train.program.guard import group_norms, scale_groups


class AdjustableState(NamedTuple):
    """What the next update is changed by.

    limits: the largest norm of the gradient of each layer and each other parameter, see `group_names`.
    scale: a factor of the update.
    """

    limits: Float[Array, " groups"]
    scale: Float[Array, ""]
    inner: optax.OptState


def adjustable(
    rule: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`rule` with gradients clipped to the state's limits, and updates times its scale."""

    def init(params: Any) -> AdjustableState:
        norms = group_norms(params, True)
        largest = jnp.full_like(norms, jnp.finfo(norms.dtype).max)
        return AdjustableState(largest, jnp.ones((), norms.dtype), rule.init(params))

    def update(
        updates: Any, state: AdjustableState, params: Any = None, **extra: Any
    ) -> tuple[Any, AdjustableState]:
        norms = group_norms(updates, True)
        factors = jnp.where(norms > state.limits, state.limits / norms, 1)
        updates = scale_groups(updates, factors, True)
        updates, inner = rule.update(updates, state.inner, params, **extra)

        def scaled(leaf: Array) -> Array:
            wide = leaf.astype(working_dtype(leaf.dtype))
            return (wide * state.scale).astype(leaf.dtype)

        return jax.tree.map(scaled, updates), state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)
