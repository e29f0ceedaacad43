"""Copying between arrays whose axes lie in memory in another order."""

from __future__ import annotations

import itertools

import numpy as np

_TILE = 32  # rows and columns copied at a time: both sides stay in the processor's cache


def copy(target: np.ndarray, values: np.ndarray) -> None:
    """Copy `values` into an array of the same shape and dtype, in tiles."""
    # numpy copies bfloat16 more slowly than integers
    bits = f"u{target.dtype.itemsize}"
    target, values = target.view(bits), values.view(bits)
    fast = [int(np.argmin(np.abs(array.strides))) for array in (target, values) if array.ndim]
    if len(set(fast)) < 2:
        target[...] = values
        return
    index: list[slice] = [slice(None)] * target.ndim
    sizes = [target.shape[axis] for axis in fast]
    for starts in itertools.product(*(range(0, size, _TILE) for size in sizes)):
        for axis, start in zip(fast, starts, strict=True):
            index[axis] = slice(start, start + _TILE)
        target[tuple(index)] = values[tuple(index)]
