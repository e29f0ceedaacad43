"""Validation of the fused loss's arguments."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llama_jax.numerics.scalars import is_integer, is_number


def find_vocab_axis(hidden: Array, kernel: Array, given: int | None) -> int:
    """Which axis of the kernel is the vocabulary: as given, or as the shapes tell. Raises ValueError."""
    size = hidden.shape[-1]
    if kernel.ndim != 2 or size not in kernel.shape:
        raise ValueError(
            f"kernel: found shape {list(kernel.shape)}, expected [{size}, V] or [V, {size}] for "
            f"hidden {list(hidden.shape)}"
        )
    if given is None:
        if kernel.shape[0] == kernel.shape[1]:
            raise ValueError(f"vocab_axis: found None, expected 0 or 1 for a square kernel {size}")
        return 1 if kernel.shape[0] == size else 0
    if given not in (0, 1) or kernel.shape[1 - given] != size:
        raise ValueError(f"vocab_axis: found {given!r}, expected the axis that is not {size} long")
    return given


def validate(
    hidden, kernel, labels, vocab, bias, scale, weights, ignore_index, reduction, chunk
) -> None:
    """Raise ValueError for arrays and options that do not go together."""

    def wrong(name: str, found: Any, expected: str) -> ValueError:
        return ValueError(f"{name}: found {found}, expected {expected}")

    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise wrong(name, array.dtype, "a floating-point dtype")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise wrong("labels", labels.dtype, "an integer dtype")
    tokens = list(hidden.shape[:-1])
    if list(labels.shape) != tokens:
        raise wrong("labels", f"shape {list(labels.shape)}", f"{tokens}, as hidden has")
    if weights is not None and list(jnp.shape(weights)) != tokens:
        raise wrong("weights", f"shape {list(jnp.shape(weights))}", f"{tokens}, one a token")
    if bias is not None and bias.shape != (vocab,):
        raise wrong("bias", f"shape {list(bias.shape)}", f"[{vocab}]")
    if scale is not None and jnp.shape(scale) not in ((), (vocab,)):
        raise wrong("scale", f"shape {list(jnp.shape(scale))}", f"a scalar or [{vocab}]")
    if reduction not in ("mean", "sum", "none"):
        raise wrong("reduction", repr(reduction), "'mean', 'sum' or 'none'")
    if chunk is not None and (not is_integer(chunk) or chunk < 1):
        raise wrong("chunk", repr(chunk), "a positive integer")
    if not isinstance(labels, jax.core.Tracer):
        known = np.asarray(labels)
        outside = known[(known != ignore_index) & ((known < 0) | (known >= vocab))]
        if outside.size:
            raise wrong("labels", outside[0], f"{ignore_index} or 0 to {vocab - 1}")


def _validate_numbers(z_loss, label_smoothing, softcap, mode) -> None:
    for name, value, low, high in (
        ("z_loss", z_loss or 0.0, 0.0, math.inf),
        ("label_smoothing", label_smoothing, 0.0, 1.0),
    ):
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f"{name}: found {value!r}, expected a number from {low} to {high}")
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        raise ValueError(f"softcap: found {softcap!r}, expected a positive number or None")
    if mode not in ("auto", "recompute", "reference"):
        raise ValueError(f"mode: found {mode!r}, expected 'auto', 'recompute' or 'reference'")
