"""FP8: a number of 8 bits for each weight, and a scale for the tensor, each row or each block.

quant_method `fp8` is DeepSeek's form (`weight_scale_inv`, by blocks) or vLLM's (`weight_scale`, one for the
tensor), `fbgemm_fp8` has a scale for each row. All multiply: weight = number * scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.packing import exponents, float8
from llama_jax.checkpoints.quantized.scheme import (
    FP8_DTYPES,
    SCALE_DTYPES,
    Parts,
    Read,
    Scheme,
    Weight,
    block_of_columns,
    blocks_of,
    by_rows,
    require,
    require_matrix,
    scaled,
)
from llama_jax.numerics.scalars import is_integer

_DEFAULT_BLOCK = (128, 128)


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """FP8 of a `quantization_config` with quant_method fp8, fbgemm_fp8 or modelopt."""
    given = fields.get("weight_block_size")
    block = None if given is None else block_shape(given, "weight_block_size")

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        name = next((n for n in ("weight_scale_inv", "weight_scale") if n in parts), None)
        stored = parts.get("weight")
        if stored is not None and stored.dtype in SCALE_DTYPES and name is None:
            return None
        shape = require_matrix(parts, "weight", *FP8_DTYPES)
        if name is None:
            raise ValueError("weight_scale: missing")
        require(parts, name, *SCALE_DTYPES, "F8_E8M0", "U8")
        return float_weight(shape, parts, name, block or _DEFAULT_BLOCK)

    return Scheme(title, ("weight", "weight_scale_inv", "weight_scale"), weight)


def block_shape(value: Any, name: str) -> tuple[int, int]:
    """Rows and columns of a block, of a config."""
    sizes = list(value) if isinstance(value, list | tuple) else []
    if len(sizes) != 2 or not all(is_integer(size) and size > 0 for size in sizes):
        raise ValueError(f"{name}: found {value!r}, expected two positive integers")
    return int(sizes[0]), int(sizes[1])


def float_weight(
    shape: tuple[int, int], parts: Parts, scale: str, block: tuple[int, int]
) -> Weight:
    """An FP8 weight whose scale, a part of this name, is for the tensor, each row or each block."""
    grid = blocks_of(shape, block)
    found = parts[scale].shape
    if math.prod(found) == 1:
        block = shape
    elif found in ((shape[0],), (shape[0], 1)) and found != grid:
        block = (1, shape[1])
    elif found != grid:
        expected = f"[1], {[shape[0], 1]} or {list(grid)}, of blocks of {list(block)}"
        raise ValueError(f"{scale}: found shape {list(found)}, expected {expected}")
    return Weight(
        shape, ("weight", scale), lambda arrays: dequantize(arrays["weight"], arrays[scale], block)
    )


def dequantize(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """FP8 [out, in] times the scale of its block [ceil(out / rows), ceil(in / columns)], in float32.

    >>> import ml_dtypes
    >>> codes = np.array([[1, 2], [3, 4]], ml_dtypes.float8_e4m3fn)
    >>> dequantize(codes, np.float32([0.5, 2]), (1, 2))
    array([[0.5, 1. ],
           [6. , 8. ]], dtype=float32)
    """
    columns = codes.shape[1]
    scale = scale_values(scale).reshape(blocks_of(codes.shape, block))
    group = block_of_columns(columns, block[1])

    def some(part: slice) -> np.ndarray:
        rows = np.arange(part.start, part.stop) // block[0]
        return scaled(float8(codes[part]), scale[rows], None, group)

    return by_rows(codes.shape, some)


def scale_values(scale: np.ndarray) -> np.ndarray:
    """Scales as float32; unsigned bytes are exponents of two."""
    if scale.dtype == np.uint8:
        return exponents(scale)
    return scale.astype(np.float32)
