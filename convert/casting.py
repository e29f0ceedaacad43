"""One tensor into another dtype, and what that did to its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.safetensors_read import all_finite


class Changes(NamedTuple):
    """How many values of a tensor a cast changed."""

    rounded: int
    """All whose value is another one than before, the following two included."""
    to_zero: int
    """Those that were not zero and are."""
    subnormal: int
    """Those that are now below the smallest normal number, where digits are lost."""


Rule = Callable[[str, np.ndarray, np.dtype[Any]], np.ndarray]
"""`(name, values, dtype) -> values` as they are to be stored."""


def casts(dtype: str | None) -> Rule:
    """The rule of formats that store plain numbers, whatever `--dtype` is."""
    return cast


def cast(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`values` as `dtype`, rounded to nearest even.

    Raises ValueError when values are not finite, or finite ones would not stay so (float16 ends at
    65504): a model with them computes NaN, and nobody would know why.
    """
    if not all_finite(values):
        count = int(values.size - np.isfinite(values).sum())
        raise ValueError(f"tensor {name}: {count} values are NaN or infinite, expected none")
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if not all_finite(result):
        count = int(result.size - np.isfinite(result).sum())
        raise ValueError(
            f"tensor {name}: {count} values overflow {dtype}, "
            f"largest magnitude {float(np.abs(values).max()):g}; choose bfloat16 or float32"
        )
    return result


_CHUNK = 2**20  # values compared at a time: bounds the temporaries


def changes(before: np.ndarray, after: np.ndarray) -> Changes | None:
    """What became of the values of `before` in `after`, arrays of one shape; None if nothing did."""
    if after is before:
        return None
    smallest = float(ml_dtypes.finfo(after.dtype).smallest_normal)
    wide = np.float64 if np.float64 in (before.dtype, after.dtype) else np.float32
    rounded = to_zero = subnormal = 0
    old, new = before.reshape(-1), after.reshape(-1)
    for start in range(0, old.size, _CHUNK):
        was, now = (each[start : start + _CHUNK].astype(wide) for each in (old, new))
        changed = was != now
        rounded += int(changed.sum())
        to_zero += int((changed & (now == 0)).sum())
        subnormal += int((changed & (now != 0) & (np.abs(now) < smallest)).sum())
    return Changes(rounded, to_zero, subnormal) if rounded else None
