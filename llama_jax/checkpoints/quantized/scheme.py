"""What all quantization schemes provide, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor
from llama_jax.files.buffers import empty
from llama_jax.numerics.scalars import is_integer, plain_number

Parts = Mapping[str, StoredTensor]
"""The stored tensors of one module, by the last part of their names: weight, weight_scale, ..."""
Arrays = Mapping[str, np.ndarray]
"""Their values, by the same names."""
Read = Callable[[StoredTensor], np.ndarray]
"""Reads a stored tensor of any dtype."""

SCALE_DTYPES = tuple(FLOAT_DTYPES)
FP8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

_BLOCK = 1 << 17  # values dequantized at a time, which stay in the processor's cache


class Integers(NamedTuple):
    """A weight that is code * scale with signed codes of 8 or 4 bits, as a `QuantizedWeight` can be.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; None for a scale per row.
        scale_dtype: as stored.
        codes: int8 [out, in]; raises ValueError where they turn out to be others.
        scale: of any shape with the scales of a row one after another.
    """

    bits: int
    group_size: int | None
    scale_dtype: str
    codes: Callable[[Arrays], np.ndarray]
    scale: Callable[[Arrays], np.ndarray]


class Weight(NamedTuple):
    """A weight that is stored in several tensors.

    Attributes:
        shape: [out, in].
        parts: names of the stored tensors that `values` needs.
        values: computes it in float32 from those; raises ValueError.
        integers: its codes and scales, where they are of that kind.
    """

    shape: tuple[int, int]
    parts: tuple[str, ...]
    values: Callable[[Arrays], np.ndarray]
    integers: Integers | None = None


@dataclass(frozen=True)
class Scheme:
    """How the weights of a checkpoint are quantized.

    Attributes:
        title: for people.
        suffixes: of the stored tensors that belong to quantized weights.
        weight: `weight(module, parts, read)` is the weight of a module, None where it is not quantized;
            raises ValueError, with the part's name first, for parts that do not fit together.
        optional: whether there may be no quantized weight at all, but scales of a key/value cache.
    """

    title: str
    suffixes: tuple[str, ...]
    weight: Callable[[str, Parts, Read], Weight | None]
    optional: bool = False


def require(parts: Parts, name: str, *dtypes: str) -> StoredTensor:
    """A part that must be there with one of `dtypes`."""
    tensor = parts.get(name)
    if tensor is None:
        raise ValueError(f"{name}: missing")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: found dtype {tensor.dtype}, expected {' or '.join(dtypes)}")
    return tensor


def require_matrix(parts: Parts, name: str, *dtypes: str) -> tuple[int, int]:
    """The shape of a matrix that must be there with one of `dtypes`."""
    shape = require(parts, name, *dtypes).shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}: found shape {list(shape)}, expected a matrix")
    return shape


def require_shape(parts: Parts, name: str, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless a part has one of `shapes`."""
    shape = parts[name].shape
    if shape not in shapes:
        expected = " or ".join(str(list(each)) for each in dict.fromkeys(shapes))
        raise ValueError(f"{name}: found shape {list(shape)}, expected {expected}")


def require_groups(columns: int, group_size: int | None, groups: int) -> None:
    """Raise ValueError unless `columns` make that many groups of equal size.

    Args:
        group_size: as config.json has it; None and -1 stand for one group.
        groups: for which there are scales.
    """
    size = columns if group_size in (None, -1) else group_size
    assert size is not None
    if columns % size:
        raise ValueError(f"group_size: found {size}, which does not divide {columns} columns")
    if columns // size != groups:
        raise ValueError(
            f"group_size: found {size}, which makes {columns // size} groups of {columns} columns, "
            f"but there are scales for {groups}"
        )


def integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """An integer of a quantization config; None is allowed if it is the default."""
    value = plain_number(fields.get(name, default))
    if value is None and default is None:
        return None
    if not is_integer(value):
        raise ValueError(f"{name}: found {value!r}, expected an integer")
    return int(value)


def group_size_of(fields: Mapping[str, Any], default: int | None = None) -> int | None:
    """`group_size` of a quantization config: a positive number, or -1 for all columns."""
    size = integer(fields, "group_size", default)
    if size is not None and size < 1 and size != -1:
        raise ValueError(f"group_size: found {size}, expected a positive number or -1")
    return size


def by_rows(
    shape: tuple[int, int], rows: Callable[[slice], np.ndarray], multiple: int = 1
) -> np.ndarray:
    """A float32 matrix computed a few rows at a time.

    Args:
        rows: computes some rows.
        multiple: each slice but the last has a multiple of so many rows.
    """
    out = empty(shape, np.dtype(np.float32))
    step = max(1, _BLOCK // max(shape[1], 1) // multiple) * multiple
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        out[part] = rows(part)
    return out


def by_columns(
    shape: tuple[int, int], columns: Callable[[slice], np.ndarray], multiple: int = 1
) -> np.ndarray:
    """As `by_rows`, a few columns at a time."""
    out = empty(shape, np.dtype(np.float32))
    step = max(1, _BLOCK // max(shape[0], 1) // multiple) * multiple
    for start in range(0, shape[1], step):
        part = slice(start, min(start + step, shape[1]))
        out[:, part] = columns(part)
    return out


def scaled(
    values: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, group: np.ndarray | None = None
) -> np.ndarray:
    """(values - zero) * scale, in place.

    Args:
        values: float32 [rows, columns].
        scale: float32 [rows or 1, groups].
        zero: of the same shape, or None.
        group: of each column [columns]; None for groups of equally many columns, in order.
    """
    if group is None:
        grouped = values.reshape(len(values), scale.shape[1], -1)
        scale, zero = scale[..., None], None if zero is None else zero[..., None]
    else:
        grouped, scale, zero = values, scale[:, group], None if zero is None else zero[:, group]
    with np.errstate(over="ignore", invalid="ignore"):  # checked by whoever reads the weight
        if zero is not None:
            grouped -= zero
        grouped *= scale
    return values


def blocks_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of blocks, those at the end perhaps in part only."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_of_columns(columns: int, block: int) -> np.ndarray | None:
    """The block of each column; None if all have equally many."""
    return np.arange(columns) // block if columns % block else None


def groups_of_columns(name: str, order: np.ndarray, groups: int) -> np.ndarray:
    """The group of each column as stored. Raises ValueError for numbers that are no groups."""
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        raise ValueError(f"{name}: found groups from {low} to {high}, expected 0 to {groups - 1}")
    return order.astype(np.int64)
