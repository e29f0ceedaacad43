"""The maximum and the sum of exponentials of each row of logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.numerics.backend import target_platform

Pair = tuple[Array, Array]


def row_statistics(
    logits: Float[Array, "chunk vocab"], axis: str | None
) -> tuple[Float[Array, " chunk"], Float[Array, " chunk"]]:
    """`row_max` and sum(exp(logits - row_max)) of each row.

    `row_max` is 0 where the maximum is not finite: a row of -inf or with +inf must not turn into NaN here
    rather than in the loss.

    Args:
        axis: a mesh axis that splits the rows: the maximum is of all shards, the sum of this one.
    """
    if target_platform() == "gpu":
        local_max, local_sum = one_pass(logits)
        row_max = _maximum_over(axis, local_max)
        return row_max, local_sum * jnp.exp(local_max - row_max)
    row_max = _maximum_over(axis, jnp.max(logits, axis=-1))
    return row_max, jnp.sum(jnp.exp(logits - row_max[:, None]), axis=-1)


def one_pass(logits: Float[Array, "chunk vocab"]) -> Pair:
    """Both statistics of each row while its logits are read once (arXiv:1805.02867).

    XLA makes one kernel of it for a GPU, where reading the logits again takes longer than the exponentials.
    The maximum may be infinite; the sum is then that of exp(logits).
    """

    def merge(a: Pair, b: Pair) -> Pair:
        (max_a, sum_a), (max_b, sum_b) = a, b
        row_max = jnp.maximum(max_a, max_b)
        shift = _finite_or_zero(row_max)
        return row_max, sum_a * jnp.exp(max_a - shift) + sum_b * jnp.exp(max_b - shift)

    nothing = jnp.array(-jnp.inf, logits.dtype), jnp.array(0, logits.dtype)
    row_max, row_sum = jax.lax.reduce((logits, jnp.ones_like(logits)), nothing, merge, (1,))
    return row_max, row_sum


def _maximum_over(axis: str | None, local_max: Array) -> Array:
    return _finite_or_zero(jax.lax.pmax(local_max, axis) if axis else local_max)


def _finite_or_zero(values: Array) -> Array:
    return jnp.where(jnp.isfinite(values), values, 0)
