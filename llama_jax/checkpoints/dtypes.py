"""Dtypes of weights: what a caller may ask for, and what stored dtypes have in common."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES


def requested_dtype(dtype: Any) -> Any:
    """The dtype a caller asked for, with torch's dtypes by their names; None for "auto"."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    name = str(dtype)
    if name.startswith("torch."):
        return name.removeprefix("torch.")
    try:
        return jnp.dtype(dtype)
    except TypeError:
        return dtype  # `require_float` reports it


def require_float(dtype: Any) -> np.dtype[Any]:
    """`dtype` as numpy's. Raises ValueError for one that weights cannot have."""
    permitted = {str(known): known for known in FLOAT_DTYPES.values()}
    try:
        float_dtype = permitted[str(jnp.dtype(dtype))]
    except (TypeError, KeyError):
        raise ValueError(
            f"dtype: found {dtype!r}, expected one of {', '.join(permitted)}"
        ) from None
    if float_dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("dtype: found float64, expected jax_enable_x64 to be on, or another dtype")
    return float_dtype


def widest(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    """The narrowest dtype that holds every value of `dtypes`: float32 for float16 with bfloat16."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
