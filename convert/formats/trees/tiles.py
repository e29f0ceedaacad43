"""Copying between arrays whose axes lie in memory in another order."""

from __future__ import annotations

import itertools

import numpy as np

_TILE = 128  # rows and columns copied at a time, which stay in the processor's cache


def copy(target: np.ndarray, values: np.ndarray) -> None:
    """Copy `values` into an array of the same shape and dtype, in tiles.

    A tile is transposed between two buffers: rows that lie a multiple of a page apart in memory, as those
    of most weights do, compete for the same few lines of the cache.
    """
    # numpy copies bfloat16 more slowly than integers
    bits = f"u{target.dtype.itemsize}"
    target, values = target.view(bits), values.view(bits)
    fast = [int(np.argmin(np.abs(array.strides))) for array in (target, values) if array.ndim]
    if len(set(fast)) < 2:
        target[...] = values
        return
    to, by = fast
    target, values = (np.moveaxis(array, (by, to), (-2, -1)) for array in (target, values))
    buffers = np.empty((2, _TILE * _TILE), bits)
    rows, columns = target.shape[-2:]
    for matrix in np.ndindex(target.shape[:-2]):
        into, of = target[matrix], values[matrix]
        for row, column in itertools.product(range(0, rows, _TILE), range(0, columns, _TILE)):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            part = of[tile]
            before = buffers[0, : part.size].reshape(part.shape[::-1])
            after = buffers[1, : part.size].reshape(part.shape)
            before.T[...] = part
            after[...] = before.T
            into[tile] = after
