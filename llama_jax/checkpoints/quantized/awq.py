"""AWQ, as AutoAWQ's `gemm` version stores it: weight = (code - zero) * scale, by groups of inputs.

`qweight` [in, out / 8] and `qzeros` [groups, out / 8] have the codes of 8 outputs in a 32-bit word, in the
order 0, 2, 4, 6, 1, 3, 5, 7; `scales` is [groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.packing import unpack
from llama_jax.checkpoints.quantized.scheme import (
    SCALE_DTYPES,
    Arrays,
    Parts,
    Read,
    Scheme,
    Weight,
    by_columns,
    group_size_of,
    integer,
    require,
    require_groups,
    require_matrix,
    require_shape,
)

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word each of 8 outputs is


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """AWQ of a `quantization_config`."""
    bits = integer(fields, "bits" if "bits" in fields else "w_bit", 4)
    if bits != 4:
        raise ValueError(f"bits: found {bits}, expected 4")
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    if version != "gemm":
        raise ValueError(f"version: found {version!r}, expected 'gemm'")
    if fields.get("zero_point", True) is not True:
        raise ValueError(f"zero_point: found {fields['zero_point']!r}, expected true")
    renamed = {"group_size": fields.get("group_size", fields.get("q_group_size"))}
    size = group_size_of(renamed)

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        if not parts.keys() - {"weight"}:
            return None
        columns, words = require_matrix(parts, "qweight", "I32", "U32")
        groups, _ = require_matrix(parts, "scales", *SCALE_DTYPES)
        require(parts, "qzeros", "I32", "U32")
        require_shape(parts, "scales", (groups, words * 8))
        require_shape(parts, "qzeros", (groups, words))
        require_groups(columns, size, groups)

        def values(arrays: Arrays) -> np.ndarray:
            return dequantize(arrays["qweight"], arrays["qzeros"], arrays["scales"])

        return Weight((words * 8, columns), ("qweight", "qzeros", "scales"), values)

    return Scheme(title, ("weight", "qweight", "qzeros", "scales"), weight)


def dequantize(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(code - zero) * scale, in float32 [out, in]."""
    columns, size = len(qweight), len(qweight) // len(qzeros)
    zeros = _in_order(qzeros).astype(np.float32)
    scale = scales.astype(np.float32)

    def some(part: slice) -> np.ndarray:
        group = np.arange(part.start, part.stop) // size
        wide = _in_order(qweight[part]).astype(np.float32)
        wide -= zeros[group]
        wide *= scale[group]
        return wide.T

    return by_columns((scales.shape[1], columns), some)


def _in_order(packed: np.ndarray) -> np.ndarray:
    codes = unpack(np.ascontiguousarray(packed), 4).reshape(*packed.shape, 8)
    return codes[..., _PLACES].reshape(len(packed), -1)
