"""Errors of arrays against a reference."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def to_numpy(x: Any) -> np.ndarray:
    """Any array (numpy, JAX, torch) as float64 numpy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def relative_error(values: Any, reference: Any) -> float:
    """max|values - reference| / max|reference|; 0 if both are all zeros, infinite if only `reference` is.

    NaN anywhere in `values` gives NaN, which is within no tolerance.
    """
    values, reference = to_numpy(values), to_numpy(reference)
    if values.shape != reference.shape:
        raise ValueError(f"shape {values.shape}, expected {reference.shape}")
    error, scale = np.abs(values - reference), np.abs(reference)
    return _ratio(error.max(initial=0.0), scale.max(initial=0.0))


def rms_error(values: Iterable[Any], reference: Iterable[Any]) -> float:
    """rms(values - reference) / rms(reference), both pooled over all arrays."""
    pairs = [(to_numpy(v), to_numpy(r)) for v, r in zip(values, reference, strict=True)]
    for v, r in pairs:
        if v.shape != r.shape:
            raise ValueError(f"shape {v.shape}, expected {r.shape}")
    error = sum(np.square(v - r).sum() for v, r in pairs)
    scale = sum(np.square(r).sum() for _, r in pairs)
    return _ratio(np.sqrt(error), np.sqrt(scale))


def worst(values: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, str]:
    """The largest relative error of arrays by name, or NaN, and its name. Both must have the same names."""
    if values.keys() != reference.keys():
        raise ValueError(f"names differ: {sorted(values.keys() ^ reference.keys())}")
    errors = {name: relative_error(values[name], reference[name]) for name in reference}
    nan = [name for name, error in errors.items() if np.isnan(error)]  # which `max` would miss
    name = nan[0] if nan else max(errors, key=errors.__getitem__)
    return errors[name], name


def _ratio(error: float, scale: float) -> float:
    if scale == 0.0:
        return 0.0 if error == 0.0 else float(np.inf)
    return float(error / scale)
