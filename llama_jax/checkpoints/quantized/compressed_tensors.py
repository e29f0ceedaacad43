"""compressed-tensors, the format of llm-compressor and vLLM: integers, FP8 and FP4, packed or not.

weight = (code - zero point) * scale, where a scale is for the tensor, each row, each group of columns or
each block. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoints.quantized.fp4 import MX_GROUP, packed_weight
from llama_jax.checkpoints.quantized.fp8 import block_shape, scale_values
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
    group_size_of,
    groups_of_columns,
    integer,
    require,
    require_groups,
    require_matrix,
    require_shape,
    scaled,
)

_FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
)
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_PARTS = ("weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx")


def scheme(fields: Mapping[str, Any], title: str) -> Scheme:
    """compressed-tensors of a `quantization_config` or `compression_config`."""
    groups = _groups(fields)

    def weight(module: str, parts: Parts, read: Read) -> Weight | None:
        stored = parts.get("weight")
        if stored is not None and stored.dtype in SCALE_DTYPES:
            scales = [name for name in _PARTS if name in parts]
            if scales:
                raise ValueError(
                    f"weight: found dtype {stored.dtype} beside {scales[0]}, expected quantized weights: "
                    "save them compressed"
                )
            return None
        settings = _settings(module, groups)
        if "weight_packed" in parts:
            if parts["weight_packed"].dtype != "U8":
                return _packed(settings, parts, read)
            group = group_size_of(settings)
            microscaling = group == MX_GROUP and "weight_global_scale" not in parts
            return packed_weight(
                parts,
                "weight_packed",
                microscaling=microscaling,
                global_scale="weight_global_scale",
                divides=True,
            )
        if stored is None:
            raise ValueError("weight: missing")
        shape = require_matrix(parts, "weight", "I8", *FP8_DTYPES)
        return _weight(settings, shape, parts, "weight", None)

    suffixes = ("weight", "weight_packed", "weight_shape", *_PARTS)
    return Scheme(title, suffixes, weight, optional=not groups)


def _groups(fields: Mapping[str, Any]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """The targets of each group of modules, and how their weights are quantized."""
    formats = [fields.get("format")]
    sparsity = fields.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        raise ValueError(
            f"sparsity_config: found format {sparsity['format']!r}, expected weights that are not stored "
            "sparse; decompress them with compressed-tensors first"
        )
    if transforms := fields.get("transform_config"):
        raise ValueError(
            f"transform_config: found {str(transforms)[:60]}, expected weights without transforms"
        )
    config = fields.get("config_groups") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"config_groups: found {str(config)[:60]}, expected an object of groups")
    groups = []
    for name, group in config.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"config_groups.{name}: found {str(group)[:60]}, expected an object")
        settings, targets = group.get("weights"), group.get("targets", ["Linear"])
        formats.append(group.get("format"))
        if settings is None:
            continue
        if not isinstance(settings, Mapping) or not isinstance(targets, list):
            raise ValueError(f"config_groups.{name}: weights or targets are not as expected")
        strategy = settings.get("strategy")
        if strategy not in (None, *_STRATEGIES):
            raise ValueError(
                f"config_groups.{name}.weights.strategy: found {strategy!r}, expected one of "
                f"{', '.join(_STRATEGIES)}"
            )
        bits = integer(settings, "num_bits", 8)
        if bits not in range(1, 9):
            raise ValueError(
                f"config_groups.{name}.weights.num_bits: found {bits}, expected 1 to 8"
            )
        group_size_of(settings)
        groups.append(([str(target) for target in targets], settings))
    for form in formats:
        if form is not None and form not in _FORMATS:
            raise ValueError(f"format: found {form!r}, expected one of {', '.join(_FORMATS)}")
    return groups


def _settings(module: str, groups: list[tuple[list[str], Mapping[str, Any]]]) -> Mapping[str, Any]:
    """How a module's weight is quantized: its name counts most, then a pattern, then its class.

    Classes other than torch's two count least: what a program calls its own linear layers is not known.
    """
    own_class = "Embedding" if module.endswith("embed_tokens") else "Linear"

    def matches(target: str) -> int:
        if target.startswith("re:"):
            try:
                return 3 if re.match(target[3:], module) else 0
            except re.error:
                raise ValueError(f"targets: found {target!r}, no regular expression") from None
        if target == module or module.endswith(f".{target}"):
            return 4
        if target == own_class:
            return 2
        return 1 if "." not in target and target[:1].isupper() else 0

    best: tuple[int, Mapping[str, Any]] = (0, {})
    for targets, settings in groups:
        rank = max(map(matches, targets), default=0)
        if rank > best[0]:
            best = rank, settings
    if not best[0]:
        raise ValueError("weight: is quantized, but no group of config_groups has it as a target")
    return best[1]


def _packed(settings: Mapping[str, Any], parts: Parts, read: Read) -> Weight:
    """Integers of a few bits in 32-bit words."""
    bits = integer(settings, "num_bits", 8)
    assert bits is not None
    rows, words = require_matrix(parts, "weight_packed", "I32")
    require(parts, "weight_shape", "I64", "I32")
    require_shape(parts, "weight_shape", (2,))
    shape = tuple(int(size) for size in read(parts["weight_shape"]))
    expected = _words(shape[1], bits)
    if shape[0] != rows or shape[1] < 1 or words not in (expected, _padded_words(shape[1], bits)):
        raise ValueError(
            f"weight_packed: found shape {[rows, words]}, expected {[shape[0], expected]} for a weight of "
            f"{list(shape)} with {bits} bits"
        )
    return _weight(settings, (rows, shape[1]), parts, "weight_packed", bits)


def _weight(
    settings: Mapping[str, Any],
    shape: tuple[int, int],
    parts: Parts,
    name: str,
    bits: int | None,
) -> Weight:
    """A weight of integers or FP8 numbers.

    Args:
        name: of the part with the codes.
        bits: of packed integers; None for one code a byte.
    """
    rows, columns = shape
    scale_shape = require(parts, "weight_scale", *SCALE_DTYPES, "U8", "F8_E8M0").shape
    block = _block(settings, shape, scale_shape)
    grid = blocks_of(shape, block)
    needed = [name, "weight_scale"]
    if not settings.get("symmetric", True) or "weight_zero_point" in parts:
        zero = require(parts, "weight_zero_point", "I8", "I32", *SCALE_DTYPES, *FP8_DTYPES)
        needed.append("weight_zero_point")
        if zero.dtype != "I32":
            require_shape(parts, "weight_zero_point", scale_shape, grid)
        elif bits is None:
            raise ValueError("weight_zero_point: found packed integers beside codes that are not")
        else:
            words = (_words(rows, bits), _padded_words(rows, bits))
            require_shape(parts, "weight_zero_point", *((count, grid[1]) for count in words))
    if "weight_g_idx" in parts:
        require(parts, "weight_g_idx", "I32", "I64")
        require_shape(parts, "weight_g_idx", (columns,))
        needed.append("weight_g_idx")

    def values(arrays: Arrays) -> np.ndarray:
        scale = scale_values(arrays["weight_scale"]).reshape(grid)
        zero = arrays.get("weight_zero_point")
        if zero is not None:
            if zero.dtype == np.int32:
                assert bits is not None
                zero = integers(np.ascontiguousarray(zero.T), bits, rows).T
            zero = zero.astype(np.float32).reshape(grid)
        group = block_of_columns(columns, block[1])
        order = arrays.get("weight_g_idx")
        if order is not None and order.min() >= 0:  # -1: groups in order
            group = groups_of_columns("weight_g_idx", order, grid[1])
        codes = arrays[name]

        def some(part: slice) -> np.ndarray:
            if bits is not None:
                wide = integers(codes[part], bits, columns).astype(np.float32)
            elif codes.dtype == np.int8:
                wide = codes[part].astype(np.float32)
            else:
                wide = float8(codes[part])
            row = np.arange(part.start, part.stop) // block[0]
            return scaled(wide, scale[row], None if zero is None else zero[row], group)

        return by_rows(shape, some)

    codes = None
    if needed == [name, "weight_scale"] and block[0] == 1 and parts[name].dtype[0] == "I":
        codes = Integers(
            bits or 8,
            None if grid[1] == 1 else block[1],
            parts["weight_scale"].dtype,
            lambda arrays: integers(arrays[name], bits, columns) if bits else arrays[name],
            lambda arrays: arrays["weight_scale"],
        )
    return Weight(shape, tuple(needed), values, codes)


def _block(
    settings: Mapping[str, Any], shape: tuple[int, int], scale: tuple[int, ...]
) -> tuple[int, int]:
    """Rows and columns of a weight of this shape that share one of the scales."""
    rows, columns = shape
    strategy, size = settings.get("strategy"), group_size_of(settings)
    if strategy == "block":
        block = _block_structure(settings.get("block_structure"))
        if scale != blocks_of(shape, block):
            raise ValueError(
                f"weight_scale: found shape {list(scale)}, expected {list(blocks_of(shape, block))}, "
                f"of blocks of {list(block)}"
            )
        return block
    if strategy in ("group", "tensor_group") or (strategy is None and size not in (None, -1)):
        if len(scale) != 2 or scale[0] != rows or not scale[1]:
            raise ValueError(
                f"weight_scale: found shape {list(scale)}, expected [{rows}, groups of {size} columns]"
            )
        require_groups(columns, size, scale[1])
        return 1, columns // scale[1]
    if math.prod(scale) == 1:
        return shape
    if scale not in ((rows,), (rows, 1)) or strategy == "tensor":
        expected = "[1]" if strategy == "tensor" else f"[{rows}, 1]"
        raise ValueError(f"weight_scale: found shape {list(scale)}, expected {expected}")
    return 1, columns


def _block_structure(value: Any) -> tuple[int, int]:
    """Rows and columns of a block: [128, 128], or "128x128" as older versions have it."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}x[0-9]{1,9}", value):
        value = [int(size) for size in value.split("x")]
    return block_shape(value, "block_structure")


def integers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Signed integers of a few bits, as rows of 32-bit words have them.

    Up to version 0.19 of compressed-tensors, a word has only complete integers and bits are left over.

    Args:
        packed: [rows, words].
        bits: 1 to 8.
        count: of integers in a row.

    Returns:
        int8 [rows, count].
    """
    if packed.shape[1] == _words(count, bits):
        codes = unpack(packed, bits)
    else:
        each = 32 // bits
        codes = unpack(packed.reshape(-1, 1), bits)[:, :each].reshape(len(packed), -1)
    return (codes[:, :count] - np.uint8(1 << (bits - 1))).view(np.int8)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _padded_words(count: int, bits: int) -> int:
    return -(-count // (32 // bits))
