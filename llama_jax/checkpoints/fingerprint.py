"""A checksum of an array that does not depend on its sharding; those of its parts add up to it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32


def fingerprint(
    array: Shaped[Array | np.ndarray, "..."], start: int | Array = 0
) -> UInt32[Array, ""]:
    """The sum, modulo 2**32, over all values of a hash of the value's bits and its position.

    The hash is a permutation for a fixed position, so a single changed value always changes the sum.

    Args:
        array: an array, or some of its rows.
        start: index of the first row; the sums of all rows add up to the array's.

    Returns:
        A uint32 scalar.

    >>> array = jnp.arange(6.0).reshape(3, 2)
    >>> parts = fingerprint(array[:1]) + fingerprint(array[1:], start=1)
    >>> (fingerprint(array) == parts).item()
    True
    """
    width = array.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(width, 32)}"))
    # mixed with the position, so that swapped values change the sum
    mixed: Any = np.uint32(0)
    for axis in range(bits.ndim):
        position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        if axis == 0:
            position = position + jnp.asarray(start).astype(jnp.uint32)
        mixed = _mix(mixed ^ (position + np.uint32(axis)))
    return jnp.sum(_mix(bits.astype(jnp.uint32) ^ mixed), dtype=jnp.uint32)


@jax.jit  # traced once for each shape
def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3, a permutation of the 32-bit integers."""
    # numpy's numbers: JAX would make an array of each, with a program
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))
