"""Multiplying a tensor by a number, rounded once, and undoing it exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama_jax.files.buffers import empty

_CHUNK = 2**16  # values at a time, which stay in the processor's cache


def scaled(values: np.ndarray, factor: float) -> np.ndarray:
    """`values` times `factor` in their own dtype, computed in float64 and rounded once.

    >>> scaled(np.float32([1.5, -2.0]), 2.0)
    array([ 3., -4.], dtype=float32)
    """
    return _by_chunks(values, lambda part: _times(part, factor), factor)


def unscaled(values: np.ndarray, factor: float) -> np.ndarray:
    """What `scaled` by `factor` is `values`, bit for bit, where there is such a thing; else the nearest.

    >>> unscaled(scaled(np.float32([0.1, 0.7]), 0.3), 0.3)
    array([0.1, 0.7], dtype=float32)
    """
    return _by_chunks(values, lambda part: _undone(part, factor), factor)


def reachable(values: np.ndarray, factor: float) -> np.ndarray:
    """`scaled(unscaled(values))`: what is read where `values` are stored without the factor."""
    return _by_chunks(values, lambda part: _times(_undone(part, factor), factor), factor)


def _by_chunks(
    values: np.ndarray, function: Callable[[np.ndarray], np.ndarray], factor: float
) -> np.ndarray:
    if factor == 1:
        return values
    result = empty(values.shape, values.dtype)
    before, after = np.ascontiguousarray(values).reshape(-1), result.reshape(-1)
    for start in range(0, before.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        after[part] = function(before[part])
    return result


def _times(values: np.ndarray, factor: float) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return (values.astype(np.float64) * factor).astype(values.dtype)


def _undone(values: np.ndarray, factor: float) -> np.ndarray:
    bits = f"i{values.dtype.itemsize}"
    result = _times(values, 1 / factor)
    for step in (1, -1):  # two roundings may end beside it
        off = np.flatnonzero(_times(result, factor) != values)
        if not off.size:
            break
        beside = (result[off].view(bits) + np.array(step, bits)).view(values.dtype)
        right = _times(beside, factor) == values[off]
        result[off[right]] = beside[right]
    return result
