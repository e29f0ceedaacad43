"""Q8_0: blocks of 32 values, each an int8 times the block's float16 scale."""

from __future__ import annotations

import math

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from jaxtyping import Float, Float32, UInt8

from convert.casting import cast
from llama_jax.checkpoints.safetensors_read import all_finite
from llama_jax.files.buffers import empty

_TYPE = GGMLQuantizationType.Q8_0
_BLOCK = GGML_QUANT_SIZES[_TYPE][0]
_CHUNK = 2**22  # values at a time: bounds the library's temporaries


def divides_into_blocks(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a matrix of this shape divide into blocks."""
    return shape[-1] % _BLOCK == 0


def quantized(values: Float[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows bytes"]:
    """A matrix as blocks: 34 bytes for every 32 columns."""
    with np.errstate(all="ignore"):  # below float32's normal numbers the scale's reciprocal is inf
        return quantize(values.astype(np.float32, copy=False), _TYPE)


def dequantized(
    name: str, values: Float[np.ndarray, "rows columns"]
) -> Float32[np.ndarray, "rows columns"]:
    """What the blocks of the matrix `name` stand for.

    Quantizing that again gives the same values: the largest of a block is 127 times its scale.

    Raises:
        ValueError: values that are not finite, or overflow the scale (float16, so from 8.3e6 on).
    """
    result = empty(values.shape, np.dtype(np.float32))
    step = max(1, _CHUNK // math.prod(values.shape[1:]))
    for start in range(0, len(values), step):
        rows = cast(name, values[start : start + step], result.dtype)
        with np.errstate(invalid="ignore"):  # an infinite scale is reported below
            result[start : start + step] = dequantize(quantized(rows), _TYPE)
    if not all_finite(result):
        raise ValueError(
            f"tensor {name}: values overflow the float16 scale of Q8_0, "
            f"largest magnitude {float(np.abs(values).max()):g}; choose bfloat16 or float32"
        )
    return result
