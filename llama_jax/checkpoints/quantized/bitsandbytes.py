"""bitsandbytes: NF4 and FP4, whose scales may be quantized themselves, and int8 by rows (LLM.int8()).

4 bits: `weight` has two codes a byte, the first in the high bits, of all rows one after another; each block
of some 64 codes has a scale, `absmax`; `quant_map` is the table of the 16 values, and
`quant_state.bitsandbytes__nf4` is JSON. 8 bits: `weight` int8 [out, in] and `SCB`, 127 times the scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.packing import codebook
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
)
from llama_jax.numerics.scalars import is_integer

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_4BIT = ("weight.absmax", "weight.quant_map")
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_MAX_STATE = 1 << 16
_ONE_127TH = np.float32(7.874015718698502e-3)  # as bitsandbytes has it


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """bitsandbytes of a `quantization_config`."""

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        if "SCB" in parts or (parts.get("weight") and parts["weight"].dtype == "I8"):
            return _int8(parts, read)
        if not parts.keys() - {"weight"} and parts["weight"].dtype in SCALE_DTYPES:
            return None
        return _4bits(parts, read)

    suffixes = ("weight", "SCB", "weight_format", *_4BIT, *_NESTED, *_STATES)
    return Scheme(title, suffixes, weight)


def _int8(parts: Parts, read: Read) -> Weight:
    shape = require_matrix(parts, "weight", "I8")
    require(parts, "SCB", *SCALE_DTYPES)
    require_shape(parts, "SCB", (shape[0],), (shape[0], 1))
    if (form := parts.get("weight_format")) is not None:
        if form.dtype != "U8" or math.prod(form.shape) != 1:
            raise ValueError(
                f"weight_format: found {form.dtype} {list(form.shape)}, expected U8 []"
            )
        if number := int(read(form).reshape(())):
            raise ValueError(f"weight_format: found {number}, expected 0, which is by rows")

    def values(arrays: Arrays) -> np.ndarray:
        return dequantize_int8(arrays["weight"], arrays["SCB"].reshape(-1))

    return Weight(shape, ("weight", "SCB"), values)


def dequantize_int8(codes: np.ndarray, scb: np.ndarray) -> np.ndarray:
    """codes [out, in] * SCB [out] / 127, in float32 and in this order."""

    def some(part: slice) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            wide = codes[part].astype(np.float32) * scb[part].astype(np.float32)[:, None]
        wide *= _ONE_127TH
        return wide

    return by_rows(codes.shape, some)


def _4bits(parts: Parts, read: Read) -> Weight:
    name = next((name for name in _STATES if name in parts), _STATES[0])
    if math.prod(require(parts, name, "U8").shape) > _MAX_STATE:
        raise ValueError(f"{name}: found {math.prod(parts[name].shape)} bytes, expected JSON")
    try:
        state = json.loads(read(parts[name]).tobytes())
        shape, block = state["shape"], state["blocksize"]
        numbers = [*shape, block]
        nested = "nested_blocksize" in state
        if nested:
            nested_block, nested_offset = state["nested_blocksize"], float(state["nested_offset"])
            numbers.append(nested_block)
        valid = len(shape) == 2 and all(is_integer(number) and number > 0 for number in numbers)
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f"{name}: not the JSON of bitsandbytes' quant_state")
    shape, count = (shape[0], shape[1]), shape[0] * shape[1]
    codes = parts.get("weight")
    if codes is None or count % 2 or codes.nbytes != count // 2:
        found = "nothing" if codes is None else f"{codes.nbytes} bytes"
        raise ValueError(
            f"weight: found {found}, expected {count // 2} for a weight of {list(shape)}"
        )
    if block % 2:
        raise ValueError(f"{name}: found blocksize {block}, expected an even number")
    blocks = -(-count // block)
    require(parts, "weight.absmax", "U8" if nested else "F32")
    require_shape(parts, "weight.absmax", (blocks,))
    require(parts, "weight.quant_map", "F32")
    require_shape(parts, "weight.quant_map", (16,))
    needed = ["weight", *_4BIT]
    if nested:
        for part in _NESTED:
            require(parts, part, "F32")
        require_shape(parts, "weight.nested_absmax", (-(-blocks // nested_block),))
        require_shape(parts, "weight.nested_quant_map", (256,))
        needed += _NESTED

    def values(arrays: Arrays) -> np.ndarray:
        absmax = arrays["weight.absmax"]
        if nested:
            absmax = nested_scales(
                absmax,
                arrays["weight.nested_absmax"],
                arrays["weight.nested_quant_map"],
                nested_block,
                nested_offset,
            )
        packed = arrays["weight"].reshape(-1).view(np.uint8)
        return dequantize_4bits(packed, absmax, arrays["weight.quant_map"], block).reshape(shape)

    return Weight(shape, tuple(needed), values)


def nested_scales(
    codes: np.ndarray, absmax: np.ndarray, table: np.ndarray, block: int, offset: float
) -> np.ndarray:
    """Scales that are quantized themselves: table[code] * absmax of its block + offset, in float32."""
    scales = table[codes] * np.repeat(absmax, block)[: len(codes)]
    return scales + np.float32(offset)


def dequantize_4bits(
    packed: np.ndarray, absmax: np.ndarray, table: np.ndarray, block: int
) -> np.ndarray:
    """table[code] * absmax of its block, in float32 [values].

    Args:
        packed: uint8 [values / 2].
        absmax: float32 [blocks].
        table: float32 [16].
        block: values that share a scale.
    """
    count = 2 * len(packed)
    out = np.empty(count, np.float32)
    step = max(1, (1 << 21) // block) * block
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        values = codebook(packed[part.start // 2 : part.stop // 2], table, low_first=False)
        scale = absmax[part.start // block : -(-part.stop // block)]
        whole = len(values) // block * block
        with np.errstate(over="ignore", invalid="ignore"):
            values[:whole].reshape(-1, block)[...] *= scale[: whole // block, None]
            values[whole:] *= scale[-1]
        out[part] = values
    return out
