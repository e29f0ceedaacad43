"""torchao: tensor subclasses, which its safetensors files describe in their metadata.

`weight` is stored as `_weight_qdata`, `_weight_scale` and perhaps `_weight_zero_point`. Int8Tensor and
IntxUnpackedToInt8Tensor have integers, (code - zero) * scale; Float8Tensor has FP8 numbers; Int4Tensor has
two signed codes a byte and code * scale + zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.packing import float8, unpack
from llama_jax.checkpoints.quantized.scheme import (
    FP8_DTYPES,
    SCALE_DTYPES,
    Arrays,
    Integers,
    Parts,
    Read,
    Scheme,
    Weight,
    block_of_columns,
    blocks_of,
    by_rows,
    require,
    require_groups,
    require_matrix,
    require_shape,
    scaled,
)
from llama_jax.checkpoints.safetensors_read import read_metadata
from llama_jax.numerics.scalars import is_integer

_QDATA, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_PRE_SCALE = "_weight_act_pre_scale"
_KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor")


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """torchao of a `quantization_config`."""

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        if not parts.keys() - {"weight"}:
            return None
        codes = require(parts, _QDATA, "I8", "U8", *FP8_DTYPES)
        kind, block = _description(read_metadata(codes.path).get(f"{module}.weight"))
        if kind not in _KINDS:
            raise ValueError(f"weight: found a {kind!r}, expected one of {', '.join(_KINDS)}")
        if _PRE_SCALE in parts:
            raise ValueError(f"{_PRE_SCALE}: unexpected, activations are not scaled here")
        if kind == "Int4Tensor":
            return _int4(parts, block)
        return _by_blocks(parts, block, FP8_DTYPES if kind == "Float8Tensor" else ("I8",))

    return Scheme(title, ("weight", _QDATA, _SCALE, _ZERO, _PRE_SCALE), weight)


def _description(text: Any) -> tuple[str, tuple[int, int] | None]:
    """Class and block size of a tensor, as the metadata have it."""
    try:
        description = json.loads(text)
        kind, block = description["_type"], description["_data"].get("block_size")
        valid = block is None or (
            len(block) == 2 and all(is_integer(size) and size > 0 for size in block)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError("weight: is not described in the metadata of the file")
    return str(kind), None if block is None else (int(block[0]), int(block[1]))


def _by_blocks(parts: Parts, block: tuple[int, int] | None, dtypes: tuple[str, ...]) -> Weight:
    shape = require_matrix(parts, _QDATA, *dtypes)
    scale = require(parts, _SCALE, *SCALE_DTYPES).shape
    if block is None:
        block = shape if math.prod(scale) == 1 else (1, shape[1])
    block = min(block[0], shape[0]), min(block[1], shape[1])
    if shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(f"block_size: found {list(block)}, which does not divide {list(shape)}")
    grid = blocks_of(shape, block)
    needed = [_QDATA, _SCALE]
    if _ZERO in parts:
        require(parts, _ZERO, "I8", "I16", "I32", "I64", *SCALE_DTYPES)
        needed.append(_ZERO)
    for name in needed[1:]:
        if math.prod(parts[name].shape) != grid[0] * grid[1]:
            raise ValueError(
                f"{name}: found shape {list(parts[name].shape)}, expected {list(grid)}"
            )

    def values(arrays: Arrays) -> np.ndarray:
        codes, scale = arrays[_QDATA], arrays[_SCALE].astype(np.float32).reshape(grid)
        zero = arrays[_ZERO].astype(np.float32).reshape(grid) if _ZERO in arrays else None
        group = block_of_columns(shape[1], block[1])

        def some(part: slice) -> np.ndarray:
            row = np.arange(part.start, part.stop) // block[0]
            wide = codes[part].astype(np.float32) if dtypes == ("I8",) else float8(codes[part])
            return scaled(wide, scale[row], None if zero is None else zero[row], group)

        return by_rows(shape, some)

    def codes(arrays: Arrays) -> np.ndarray:
        if _ZERO in arrays and arrays[_ZERO].any():
            raise ValueError(f"{_ZERO}: found zeros other than 0, expected symmetric codes")
        return arrays[_QDATA]

    integers = None
    if dtypes == ("I8",) and block[0] == 1:
        size = None if grid[1] == 1 else block[1]
        dtype = parts[_SCALE].dtype
        integers = Integers(8, size, dtype, codes, lambda arrays: arrays[_SCALE])
    return Weight(shape, tuple(needed), values, integers)


def _int4(parts: Parts, block: tuple[int, int] | None) -> Weight:
    rows, half = require_matrix(parts, _QDATA, "I8", "U8")
    groups = require_matrix(parts, _SCALE, *SCALE_DTYPES)[0]
    require(parts, _ZERO, *SCALE_DTYPES)
    for name in (_SCALE, _ZERO):
        require_shape(parts, name, (groups, rows))
    require_groups(2 * half, None if block is None else block[1], groups)

    def values(arrays: Arrays) -> np.ndarray:
        scale, zero = (arrays[name].T.astype(np.float32) for name in (_SCALE, _ZERO))

        def some(part: slice) -> np.ndarray:
            # signed: 8 to 15 stand for -8 to -1
            codes = unpack(arrays[_QDATA][part], 4) ^ np.uint8(8)
            wide = codes.astype(np.float32) - 8
            grouped = wide.reshape(len(wide), groups, -1)
            with np.errstate(over="ignore", invalid="ignore"):
                grouped *= scale[part][..., None]
                grouped += zero[part][..., None]
            return wide

        return by_rows((rows, 2 * half), some)

    return Weight((rows, 2 * half), (_QDATA, _SCALE, _ZERO), values)
