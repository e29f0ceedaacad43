"""Validation of PRNG keys, typed and raw, and of flax's `Rngs`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from llama_jax.numerics.scalars import is_integer, plain_number


def as_key(name: str, key: Any) -> Key[Array, ""] | None:
    """One typed key, or None.

    Args:
        name: of the argument, for the error message.
        key: of `jax.random.key`, or the raw uint32 array of `jax.random.PRNGKey`, also as numpy.

    Raises:
        ValueError: an array of keys, a seed or anything else.
    """
    if key is None:
        return None
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim:
            raise ValueError(f"{name}: found {key.shape} keys, expected one")
        return key
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if isinstance(key, np.ndarray | jax.Array) and (key.dtype, key.shape) == (raw.dtype, raw.shape):
        return jax.random.wrap_key_data(jnp.asarray(key))
    shown = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") and key.shape else repr(key)
    number = plain_number(key)
    seed = number if is_integer(number) else 0
    raise ValueError(f"{name}: found {shown}, expected a PRNG key such as jax.random.key({seed})")


def require_rngs(rngs: Any) -> None:
    """Raise ValueError unless `rngs` is a `flax.nnx.Rngs`."""
    if not isinstance(rngs, nnx.Rngs):
        shown = repr(rngs).split("\n")[0]
        raise ValueError(f"rngs: found {shown}, expected flax.nnx.Rngs such as nnx.Rngs(0)")
