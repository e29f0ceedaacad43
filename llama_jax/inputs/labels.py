"""Validation of label arrays."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llama_jax.inputs.positions import known_value
from llama_jax.loss import IGNORE_INDEX


def require_labels(labels: Array | np.ndarray, shape: tuple[int, ...], classes: int) -> None:
    """Raise ValueError unless `labels` are integers of `shape`, below `classes` or IGNORE_INDEX.

    Under jit only dtype and shape are known; there, the loss of a label out of range is NaN.
    """
    if labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels: found {labels.dtype}{list(labels.shape)}, expected integers {list(shape)}"
        )
    known = known_value(labels)
    if known is None:
        return
    wrong = known[(known != IGNORE_INDEX) & ((known < 0) | (known >= classes))]
    if wrong.size:
        raise ValueError(f"labels: found {wrong[0]}, expected {IGNORE_INDEX} or 0 to {classes - 1}")
