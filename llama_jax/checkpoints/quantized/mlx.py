"""MLX: weight = code * scale + bias by groups of columns; or MXFP4, MXFP8 or NVFP4, without biases.

`weight` uint32 has the codes bit by bit. mlx computes in the dtype of the scales and rounds twice; here
it is float32, as mlx does with scales in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.quantized.packing import exponents, float4, float8, unpack
from llama_jax.checkpoints.quantized.scheme import (
    SCALE_DTYPES,
    Arrays,
    Parts,
    Read,
    Scheme,
    Weight,
    by_rows,
    group_size_of,
    integer,
    require,
    require_groups,
    require_matrix,
    require_shape,
    scaled,
)

_BITS = (2, 3, 4, 5, 6, 8)
_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group size


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """MLX of a `quantization` or `quantization_config`, which may have other settings for some modules."""
    _mode(fields)

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        stored = parts.get("weight")
        if stored is not None and stored.dtype in SCALE_DTYPES and len(parts) == 1:
            return None
        own = fields.get(module)
        mode, bits, size = _mode({**fields, **own} if isinstance(own, Mapping) else fields)
        rows, words = require_matrix(parts, "weight", "U32")
        if words * 32 % bits:
            raise ValueError(
                f"weight: found {words} words a row, which hold no codes of {bits} bits"
            )
        columns = words * 32 // bits
        scales = ("U8",) if mode != "affine" else SCALE_DTYPES
        groups = require_matrix(parts, "scales", *scales)[1]
        require_shape(parts, "scales", (rows, groups))
        require_groups(columns, size, groups)
        if mode == "affine":
            require(parts, "biases", *SCALE_DTYPES)
            require_shape(parts, "biases", (rows, groups))

        def values(arrays: Arrays) -> np.ndarray:
            if mode == "affine":
                return dequantize(arrays["weight"], arrays["scales"], arrays["biases"], bits)
            return dequantize_floats(arrays["weight"], arrays["scales"], mode)

        needed = ("weight", "scales", "biases") if mode == "affine" else ("weight", "scales")
        return Weight((rows, columns), needed, values)

    return Scheme(title, ("weight", "scales", "biases"), weight)


def dequantize(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """code * scale + bias, in float32 [out, in].

    >>> words = np.array([[0x76543210]], np.uint32)
    >>> dequantize(words, np.float32([[0.5, 2]]), np.float32([[1, 0]]), 4)
    array([[ 1. ,  1.5,  2. ,  2.5,  8. , 10. , 12. , 14. ]], dtype=float32)
    """
    rows, groups = scales.shape

    def some(part: slice) -> np.ndarray:
        wide = unpack(packed[part], bits).astype(np.float32)
        grouped = wide.reshape(len(wide), groups, -1)
        with np.errstate(over="ignore", invalid="ignore"):
            grouped *= scales[part].astype(np.float32)[..., None]
            grouped += biases[part].astype(np.float32)[..., None]
        return wide

    return by_rows((rows, packed.shape[1] * 32 // bits), some)


def dequantize_floats(packed: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """E2M1 or E4M3 numbers times the scale of their group, in float32 [out, in]."""
    scale = float8(scales.view(ml_dtypes.float8_e4m3fn)) if mode == "nvfp4" else exponents(scales)

    def some(part: slice) -> np.ndarray:
        codes = packed[part].view(np.uint8)
        wide = float8(codes.view(ml_dtypes.float8_e4m3fn)) if mode == "mxfp8" else float4(codes)
        return scaled(wide, scale[part], None)

    return by_rows((len(packed), packed.shape[1] * 32 // _FLOATS[mode][0]), some)


def _mode(fields: Mapping[str, Any]) -> tuple[str, int, int]:
    """Mode, bits and group size."""
    mode = fields.get("mode", "affine")
    if mode in _FLOATS:
        return mode, *_FLOATS[mode]
    if mode != "affine":
        raise ValueError(f"mode: found {mode!r}, expected one of {', '.join(('affine', *_FLOATS))}")
    bits, size = integer(fields, "bits", 4), group_size_of(fields, 64)
    if bits not in _BITS:
        raise ValueError(f"bits: found {bits}, expected one of {', '.join(map(str, _BITS))}")
    assert size is not None
    return mode, bits, size
