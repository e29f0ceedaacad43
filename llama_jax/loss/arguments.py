"""Validation of the fused loss's arguments."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.numerics.scalars import is_integer, is_number


def find_vocab_axis(
    hidden: Float[Array, "*tokens hidden"],
    kernel: Float[Array, "rows columns"],
    vocab_axis: int | None,
) -> int:
    """Which axis of the kernel is the vocabulary; None tells it from the shapes. Raises ValueError."""
    size = hidden.shape[-1]
    if kernel.ndim != 2 or size not in kernel.shape:
        raise ValueError(
            f"kernel: found shape {list(kernel.shape)}, expected [{size}, V] or [V, {size}] for "
            f"hidden {list(hidden.shape)}"
        )
    if vocab_axis is None:
        if kernel.shape[0] == kernel.shape[1]:
            raise ValueError(f"vocab_axis: found None, expected 0 or 1 for a square kernel {size}")
        return 1 if kernel.shape[0] == size else 0
    if vocab_axis not in (0, 1) or kernel.shape[1 - vocab_axis] != size:
        raise ValueError(
            f"vocab_axis: found {vocab_axis!r}, expected the axis that is not {size} long"
        )
    return vocab_axis


def check_arrays(
    hidden: Array,
    kernel: Array,
    labels: Any,
    vocab: int,
    *,
    bias: Any = None,
    scale: Any = None,
    weights: Any = None,
) -> None:
    """Raise ValueError for shapes and dtypes that do not go together."""
    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: found {array.dtype}, expected a floating-point dtype")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: found {labels.dtype}, expected an integer dtype")
    token_shape = hidden.shape[:-1]
    _check_shape("labels", labels, [token_shape], "hidden's without its last dimension")
    _check_shape("weights", weights, [token_shape], "one per token")
    _check_shape("bias", bias, [(vocab,)], "one per vocabulary entry")
    _check_shape("scale", scale, [(), (vocab,)], "a factor for each vocabulary entry")


def _check_shape(name: str, array: Any, shapes: list[tuple[int, ...]], meaning: str) -> None:
    if array is None:
        return
    shape = jnp.shape(array)
    if shape not in shapes:
        expected = " or ".join(str(list(one)) if one else "a scalar" for one in shapes)
        raise ValueError(f"{name}: found shape {list(shape)}, expected {expected} ({meaning})")


def check_labels(labels: Int[Array, "*tokens"], vocab: int, ignore_index: int) -> None:
    """Raise ValueError for labels outside the vocabulary, where their values are known."""
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)
    outside = values[(values != ignore_index) & ((values < 0) | (values >= vocab))]
    if outside.size:
        raise ValueError(f"labels: found {outside[0]}, expected {ignore_index} or 0 to {vocab - 1}")


def check_options(
    *,
    reduction: str,
    mode: str,
    chunk: int | None,
    z_loss: float | None,
    label_smoothing: float,
    softcap: float | None,
) -> None:
    """Raise ValueError for options out of their range."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: found {reduction!r}, expected 'mean', 'sum' or 'none'")
    if mode not in ("auto", "recompute", "reference"):
        raise ValueError(f"mode: found {mode!r}, expected 'auto', 'recompute' or 'reference'")
    if chunk is not None and (not is_integer(chunk) or chunk < 1):
        raise ValueError(f"chunk: found {chunk!r}, expected a positive integer")
    for name, value, low, high in (
        ("z_loss", z_loss or 0.0, 0.0, math.inf),
        ("label_smoothing", label_smoothing, 0.0, 1.0),
    ):
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f"{name}: found {value!r}, expected a number from {low} to {high}")
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        raise ValueError(f"softcap: found {softcap!r}, expected a positive number or None")
