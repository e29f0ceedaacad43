"""Reduce one loss per token to the requested losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llama_jax.loss.operands import Losses, Tokens
from llama_jax.loss.options import Options


class Reduced(NamedTuple):
    """Scalars, or one entry per token without a reduction; total = ce + z."""

    total: Float[Array, "*tokens"]
    ce: Float[Array, "*tokens"]
    z: Float[Array, "*tokens"]


def reduce_losses(
    options: Options, losses: Losses, tokens: Tokens, divisor: Float[Array, ""] | None
) -> Reduced:
    """Weight the losses; then leave them, sum them or (with a divisor) average them."""
    ce, z = losses.ce, losses.z
    if tokens.weights is not None:
        ce, z = ce * tokens.weights, z * tokens.weights
    if not options.per_token:
        valid = tokens.labels != options.ignore_index
        ce, z = _total(ce, valid, divisor), _total(z, valid, divisor)
    return Reduced(ce + z, ce, z)


def _total(
    values: Float[Array, "*tokens"], valid: Bool[Array, "*tokens"], divisor: Float[Array, ""] | None
) -> Float[Array, ""]:
    """The sum of the valid values, over the divisor if there is one.

    A long sum of similar numbers loses bits that the sum of their deviations from the mean keeps.
    """
    count = jnp.maximum(jnp.sum(valid), 1).astype(values.dtype) if divisor is None else divisor
    mean = jax.lax.stop_gradient(jnp.sum(values) / count)
    # an infinite loss must not come out as inf - inf
    mean = jnp.where(jnp.isfinite(mean), mean, 0)
    deviations = jnp.sum(jnp.where(valid, values - mean, 0))
    return mean * count + deviations if divisor is None else mean + deviations / count
