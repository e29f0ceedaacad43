"""Arrays as callers pass them, and the positions of `logits_to_keep`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llama_jax.loss import IGNORE_INDEX
from llama_jax.numerics.scalars import is_integer, plain_number


def as_array(value: Any) -> Any:
    """Lists and tuples as numpy arrays, anything else unchanged."""
    return np.asarray(value) if isinstance(value, list | tuple) else value


def known_value(value: Any) -> np.ndarray | None:
    """The value as numpy, or None if it is traced (under jit or grad)."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def keep_positions(values: Array, logits_to_keep: int | Array | np.ndarray) -> Array:
    """Rows of [batch, seq, ...]: all for 0, the last N for an int, those of an index array."""
    logits_to_keep = plain_number(as_array(logits_to_keep))
    if is_integer(logits_to_keep):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep: found {logits_to_keep}, expected 0 or more")
        return values[:, -int(logits_to_keep) :]
    indices, seq = jnp.asarray(logits_to_keep), values.shape[1]
    if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim not in (1, 2):
        raise ValueError(
            f"logits_to_keep: found {indices.dtype}{list(indices.shape)}, expected an int or an "
            "integer array [kept] or [batch, kept]"
        )
    known = known_value(logits_to_keep)
    if known is not None and ((known < -seq) | (known >= seq)).any():
        raise ValueError(f"logits_to_keep: found {known.tolist()}, expected {-seq} to {seq - 1}")
    # under jit, an index out of range gives NaN, or a label that makes the loss NaN
    invalid = jnp.nan if jnp.issubdtype(values.dtype, jnp.floating) else IGNORE_INDEX - 1
    if indices.ndim == 1:
        return values.at[:, indices].get(mode="fill", fill_value=invalid)
    return jax.vmap(lambda row, kept: row.at[kept].get(mode="fill", fill_value=invalid))(
        values, indices
    )
