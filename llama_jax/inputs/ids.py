"""Validation of token ids."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llama_jax.inputs.positions import known_value


def require_ids(name: str, ids: Array | np.ndarray, vocab_size: int) -> None:
    """Raise ValueError unless `ids` are integers [batch, seq]; outside jit also below `vocab_size`."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name}: found dtype {ids.dtype}, expected an integer dtype")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"{name}: found shape {ids.shape}, expected [batch, seq] of at least one")
    known = known_value(ids)
    if known is None:
        return  # the embedding of a wrong id is NaN
    wrong = known[(known < 0) | (known >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{name}: found token {wrong[0]}, expected 0 to {vocab_size - 1}")
