"""One number for an array's values and their places, which no sharding changes and parts add up to."""

from typing import Any

import jax
import jax.numpy as jnp


def fingerprint(leaf: Any, start: int | jax.Array = 0) -> Any:
    """A uint32: the sum, modulo 2**32, over every value's bits mixed with its place.

    Each step of the mixing can be undone, so that one changed value always shows.

    Args:
        leaf: an array, or the rows of one from `start` on: the numbers of all rows add up to the whole's.
    """
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(width, 32)}"))
    # mixed with the place, so that values which change places show
    mixed = jnp.uint32(0)
    for axis in range(bits.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        if axis == 0:
            place = place + jnp.asarray(start).astype(jnp.uint32)
        mixed = _mix(mixed ^ (place + jnp.uint32(axis)))
    return jnp.sum(_mix(bits.astype(jnp.uint32) ^ mixed), dtype=jnp.uint32)


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3, a permutation of the 32-bit integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))
