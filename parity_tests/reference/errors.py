"""Errors of arrays against a reference."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def to_numpy(x: Any) -> np.ndarray:
    """Any array (numpy, JAX, torch) as float64 numpy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def relative_error(got: Any, want: Any) -> float:
    """max|got - want| / max|want|; 0 where both are all zeros, infinite where only `want` is.

    NaN anywhere in `got` gives NaN, which is below no tolerance.
    """
    got, want = to_numpy(got), to_numpy(want)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, expected {want.shape}")
    return _ratio(np.abs(got - want).max(initial=0.0), np.abs(want).max(initial=0.0))


def rms_error(got: Iterable[Any], want: Iterable[Any]) -> float:
    """rms(got - want) / rms(want), each pooled over all the arrays given."""
    pairs = [(to_numpy(g), to_numpy(w)) for g, w in zip(got, want, strict=True)]
    for g, w in pairs:
        if g.shape != w.shape:
            raise ValueError(f"shape {g.shape}, expected {w.shape}")
    error = sum(np.square(g - w).sum() for g, w in pairs)
    scale = sum(np.square(w).sum() for _, w in pairs)
    return _ratio(np.sqrt(error), np.sqrt(scale))


def worst(got: Mapping[str, Any], want: Mapping[str, Any]) -> tuple[float, str]:
    """The largest relative error over named arrays, and its name. The names must be the same."""
    if got.keys() != want.keys():
        raise ValueError(f"names differ: {sorted(got.keys() ^ want.keys())}")
    errors = {name: relative_error(got[name], want[name]) for name in want}
    # NaN compares false with everything, so it is looked for first.
    name = next((n for n, e in errors.items() if np.isnan(e)), None) or max(
        errors, key=errors.__getitem__
    )
    return errors[name], name


def _ratio(error: float, scale: float) -> float:
    if scale == 0.0:
        return 0.0 if error == 0.0 else float(np.inf)
    return float(error / scale)
