"""Casting a tensor to another dtype, and counting what that changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.safetensors_read import all_finite
from llama_jax.files.buffers import empty


class Changes(NamedTuple):
    """How many values of a tensor a cast changed."""

    rounded: int
    """All that changed, the following two included."""
    to_zero: int
    """Those that became zero."""
    subnormal: int
    """Those that fell below the smallest normal number, where digits are lost."""


CastRule = Callable[[str, np.ndarray, np.dtype[Any]], np.ndarray]
"""`(name, values, dtype) -> values` as they are to be stored."""


def cast(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`values` as `dtype`, rounded to nearest even; `values` itself where it has that dtype.

    Raises:
        ValueError: values that are not finite, or would overflow (float16 ends at 65504): a model with them
            computes NaN, and nobody would know why.

    >>> cast("norm", np.float32([1.0009765, 2.0]), np.dtype(np.float16))
    array([1.001, 2.   ], dtype=float16)
    """
    if values.dtype == dtype:
        if not all_finite(values):
            raise _not_finite(name, values)
        return values
    result = empty(values.shape, dtype)
    before, after = values.reshape(-1), result.reshape(-1)
    for start in range(0, before.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):
            after[part] = before[part]  # what is not finite stays so
        if not all_finite(after[part]):
            raise _overflow(name, values, dtype)
    return result


def _not_finite(name: str, values: np.ndarray) -> ValueError:
    with np.errstate(invalid="ignore"):  # some NaNs of bfloat16 signal
        count = int(values.size - np.isfinite(values).sum())
    return ValueError(f"tensor {name}: {count} values are NaN or infinite, expected none")


def _overflow(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> ValueError:
    """The error of an overflow; or of NaN and infinities, which a later block may hold."""
    if not all_finite(values):
        return _not_finite(name, values)
    with np.errstate(over="ignore"):
        count = int(values.size - np.isfinite(values.astype(dtype)).sum())
    return ValueError(
        f"tensor {name}: {count} values overflow {dtype}, "
        f"largest magnitude {float(np.abs(values).max()):g}; choose bfloat16 or float32"
    )


_BLOCK = 2**17  # values at a time, which stay in the processor's cache


def changes(before: np.ndarray, after: np.ndarray) -> Changes | None:
    """How many values differ between two arrays of one shape; None if none do.

    >>> changes(np.float32([1e-9, 1.0]), np.float16([1e-9, 1.0]))
    Changes(rounded=1, to_zero=1, subnormal=0)
    """
    if after is before:
        return None
    smallest = float(ml_dtypes.finfo(after.dtype).smallest_normal)
    wide = np.float64 if np.float64 in (before.dtype, after.dtype) else np.float32
    rounded = to_zero = subnormal = 0
    all_before, all_after = before.reshape(-1), after.reshape(-1)
    for start in range(0, all_before.size, _BLOCK):
        old = all_before[start : start + _BLOCK].astype(wide, copy=False)
        new = all_after[start : start + _BLOCK].astype(wide, copy=False)
        changed = old != new
        count = int(np.count_nonzero(changed))
        if not count:
            continue
        rounded += count
        changed &= np.abs(new) < smallest
        if small := int(np.count_nonzero(changed)):
            zeros = int(np.count_nonzero(new[changed] == 0))
            to_zero += zeros
            subnormal += small - zeros
    return Changes(rounded, to_zero, subnormal) if rounded else None
