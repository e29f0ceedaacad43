"""The language-model loss: cross-entropy of float32 logits, ignored labels left out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE_INDEX = -100


def shift_labels(labels: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Labels of the next token: the first dropped, IGNORE_INDEX put at the end (as transformers does)."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def cross_entropy(
    logits: Float[Array, "*tokens vocab"],
    labels: Int[Array, "*tokens"],
    num_items: Any = None,
) -> Float[Array, ""]:
    """Sum of -log softmax(logits)[label] over labels that are not IGNORE_INDEX, divided.

    Args:
        logits: float32 or float64.
        labels: ids, or IGNORE_INDEX. Another id outside the vocabulary gives NaN.
        num_items: the divisor (`num_items_in_batch` of transformers); None divides by the number of
            valid labels. With no valid label the loss is 0 and its gradients are 0, where torch has NaN.
    """
    valid = labels != IGNORE_INDEX
    rows = jnp.where(valid, labels, 0)[..., None]
    chosen = jnp.take_along_axis(logits, rows, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
    # the gather wraps negative ids around; they are as wrong as ids beyond the vocabulary
    chosen = jnp.where(rows[..., 0] < 0, jnp.nan, chosen)
    losses = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)
    count = jnp.maximum(valid.sum(), 1).astype(losses.dtype)
    # A long sum of like numbers loses bits that the sum of their deviations from the mean keeps: the
    # second pass halves the error of the result. Its centre is a constant to the gradient.
    centre = jax.lax.stop_gradient(losses.sum() / count)
    mean = centre + jnp.where(valid, losses - centre, 0).sum() / count
    if num_items is None:
        return mean
    divisor = jnp.asarray(num_items).astype(losses.dtype)
    if divisor.size != 1:
        raise ValueError(f"num_items_in_batch: found shape {divisor.shape}, expected one number")
    return mean * count / divisor.reshape(())
