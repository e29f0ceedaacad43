"""Blocks of E2M1 numbers: MXFP4 (32, with a power of two as scale), NVFP4 (16, with an FP8 scale).

NVFP4 has a scale of the whole tensor as well, which compressed-tensors divides by and modelopt multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.packing import exponents, float4
from llama_jax.checkpoints.quantized.scheme import (
    SCALE_DTYPES,
    Arrays,
    Parts,
    Read,
    Scheme,
    Weight,
    by_rows,
    require,
    require_matrix,
    require_shape,
    scaled,
)

MX_GROUP, NV_GROUP = 32, 16


def mxfp4(fields: Mapping[str, Any], title: str) -> Scheme:
    """quant_method mxfp4: `weight_blocks` [out, groups, 16] and `weight_scales` [out, groups]."""

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        if "weight_blocks" not in parts and "weight_scales" not in parts:
            return None
        blocks = require(parts, "weight_blocks", "U8").shape
        require(parts, "weight_scales", "U8")
        if len(blocks) != 3 or blocks[2] != MX_GROUP // 2 or 0 in blocks:
            raise ValueError(
                f"weight_blocks: found shape {list(blocks)}, expected [out, groups, {MX_GROUP // 2}]"
            )
        require_shape(parts, "weight_scales", blocks[:2])

        def values(arrays: Arrays) -> np.ndarray:
            packed = arrays["weight_blocks"].reshape(blocks[0], -1)
            return dequantize(packed, exponents(arrays["weight_scales"]))

        return Weight((blocks[0], blocks[1] * MX_GROUP), ("weight_blocks", "weight_scales"), values)

    return Scheme(title, ("weight", "weight_blocks", "weight_scales"), weight)


def packed_weight(
    parts: Parts, name: str, *, microscaling: bool, global_scale: str = "", divides: bool = False
) -> Weight:
    """A weight of two E2M1 numbers a byte.

    Args:
        name: of the part with the numbers.
        microscaling: MXFP4; else NVFP4.
        global_scale: name of the part with the scale of the tensor, of NVFP4.
        divides: whether the scale of a group is to be divided by it.
    """
    rows, half = require_matrix(parts, name, "U8")
    group = MX_GROUP if microscaling else NV_GROUP
    require(parts, "weight_scale", *(("U8", "F8_E8M0") if microscaling else ("F8_E4M3",)))
    if 2 * half % group:
        raise ValueError(f"group_size: found {group}, which does not divide {2 * half} columns")
    require_shape(parts, "weight_scale", (rows, 2 * half // group))
    if not microscaling and math.prod(require(parts, global_scale, *SCALE_DTYPES).shape) != 1:
        raise ValueError(
            f"{global_scale}: found shape {list(parts[global_scale].shape)}, expected [1]"
        )

    def values(arrays: Arrays) -> np.ndarray:
        scale = arrays["weight_scale"]
        if microscaling:
            return dequantize(arrays[name], exponents(scale.view(np.uint8)))
        tensor = arrays[global_scale].astype(np.float32).reshape(())
        with np.errstate(divide="ignore", invalid="ignore"):
            wide = scale.astype(np.float32)
            wide = wide / tensor if divides else wide * tensor
        return dequantize(arrays[name], wide)

    needed = (name, "weight_scale") if microscaling else (name, "weight_scale", global_scale)
    return Weight((rows, 2 * half), needed, values)


def dequantize(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E2M1 numbers [out, in / 2], two a byte, times the scale of their group [out, groups], in float32."""
    rows, half = packed.shape
    return by_rows((rows, 2 * half), lambda part: scaled(float4(packed[part]), scale[part], None))
