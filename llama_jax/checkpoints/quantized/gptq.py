"""GPTQ, as AutoGPTQ and GPTQModel store it: weight = (code - zero) * scale, by groups of inputs.

`qweight` [in * bits / 32, out] has the codes of consecutive inputs in 32-bit words, `qzeros` [groups, out *
bits / 32] those of consecutive outputs, `scales` is [groups, out], and `g_idx` [in] is the group of each
input, in any order with `desc_act`. In format `gptq` the zeros are stored less 1, in `gptq_v2` as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.packing import unpack
from llama_jax.checkpoints.quantized.scheme import (
    SCALE_DTYPES,
    Arrays,
    Integers,
    Parts,
    Read,
    Scheme,
    Weight,
    by_columns,
    group_size_of,
    groups_of_columns,
    integer,
    require,
    require_groups,
    require_matrix,
    require_shape,
)

_BITS = (2, 3, 4, 8)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """GPTQ of a `quantization_config`."""
    form = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    if form not in _ZERO_OFFSETS:
        raise ValueError(
            f"checkpoint_format: found {form!r}, expected one of {', '.join(_ZERO_OFFSETS)}"
        )
    if fields.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise ValueError(f"pack_dtype: found {fields['pack_dtype']!r}, expected 'int32'")
    offset = _ZERO_OFFSETS[form]
    _bits(fields)
    group_size_of(fields, -1)
    changes = fields.get("dynamic") or {}
    if not isinstance(changes, Mapping):
        raise ValueError(f"dynamic: found {str(changes)[:60]}, expected an object")

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        if not parts.keys() - {"weight"}:
            return None
        own = {**fields, **_change(changes, module)}
        bits, size = _bits(own), group_size_of(own, -1)
        words, rows = require_matrix(parts, "qweight", "I32", "U32")
        groups, _ = require_matrix(parts, "scales", *SCALE_DTYPES)
        require(parts, "qzeros", "I32", "U32")
        columns = words * 32 // bits
        require_shape(parts, "scales", (groups, rows))
        if words * 32 % bits or rows * bits % 32:
            raise ValueError(
                f"qweight: found shape {[words, rows]}, which holds no codes of {bits} bits"
            )
        require_shape(parts, "qzeros", (groups, rows * bits // 32))
        require_groups(columns, size, groups)
        needed = ["qweight", "qzeros", "scales"]
        if "g_idx" in parts:
            require(parts, "g_idx", "I32", "I64")
            require_shape(parts, "g_idx", (columns,))
            needed.append("g_idx")

        def values(arrays: Arrays) -> np.ndarray:
            order = arrays.get("g_idx", np.arange(columns) // (columns // groups))
            group = groups_of_columns("g_idx", order, groups)
            return dequantize(
                arrays["qweight"], arrays["qzeros"], arrays["scales"], group, bits, offset
            )

        def codes(arrays: Arrays) -> np.ndarray:
            middle = 1 << (bits - 1)
            zeros = unpack(arrays["qzeros"], bits) + np.uint8(offset)
            if (zeros != middle).any():
                raise ValueError(
                    f"qzeros: found zeros other than {middle}, expected symmetric codes"
                )
            order = np.arange(columns) // (columns // groups)
            if (arrays.get("g_idx", order) != order).any():
                raise ValueError("g_idx: found groups that are not in order")
            unsigned = unpack(np.ascontiguousarray(arrays["qweight"].T), bits)
            return (unsigned - np.uint8(middle)).view(np.int8)

        integers = Integers(
            bits,
            None if groups == 1 else columns // groups,
            parts["scales"].dtype,
            codes,
            lambda arrays: np.ascontiguousarray(arrays["scales"].T),
        )
        return Weight((rows, columns), tuple(needed), values, integers)

    return Scheme(title, ("weight", "qweight", "qzeros", "scales", "g_idx"), weight)


def dequantize(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    group: np.ndarray,
    bits: int,
    zero_offset: int,
) -> np.ndarray:
    """(code - zero) * scale, in float32 [out, in].

    Args:
        group: of each input.
        zero_offset: to be added to the stored zeros, which wrap around.
    """
    zeros = (unpack(qzeros, bits) + np.uint8(zero_offset)) & np.uint8((1 << bits) - 1)
    zero, scale = (np.ascontiguousarray(each.T.astype(np.float32)) for each in (zeros, scales))

    def some(part: slice) -> np.ndarray:
        words = slice(part.start * bits // 32, -(-part.stop * bits // 32))
        codes = unpack(np.ascontiguousarray(qweight[words].T), bits)
        wide = codes.astype(np.float32)
        wide -= zero[:, group[part]]
        wide *= scale[:, group[part]]
        return wide

    return by_columns((qweight.shape[1], len(group)), some, multiple=32)


def _bits(fields: Mapping[str, Any]) -> int:
    bits = integer(fields, "bits", 0)
    if bits not in _BITS:
        raise ValueError(
            f"bits: found {fields.get('bits')!r}, expected one of {', '.join(map(str, _BITS))}"
        )
    return bits


def _change(changes: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What GPTQModel's `dynamic` changes for a module: "+:PATTERN" or "PATTERN" -> settings."""
    for pattern, settings in changes.items():
        if pattern.startswith("-:") or not isinstance(settings, Mapping):
            continue
        try:
            if re.match(pattern.removeprefix("+:"), module):
                return settings
        except re.error:
            raise ValueError(f"dynamic: found {pattern!r}, no regular expression") from None
    return {}
