"""The dtype in which parts of a sum travel between devices."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama_jax.numerics.backend import target_platform


def as_sent(part: Float[Array, "..."], dtype: DTypeLike | None) -> Float[Array, "..."]:
    """A device's part of a sum as `jax.lax.psum` is to send it, rounded to `dtype`; None keeps it."""
    if dtype is None or part.dtype == dtype:
        return part
    if target_platform() != "cpu":
        return part.astype(dtype)
    # XLA's CPU backend adds up bfloat16 in float32 anyway, but crashes where a `shard_map` asks for it.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(part, exponent_bits=info.nexp, mantissa_bits=info.nmant)
