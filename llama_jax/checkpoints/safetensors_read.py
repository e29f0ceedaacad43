"""Read safetensors files: the header is checked completely, data is read straight into an array.

The `safetensors` library maps files into memory, whose pages count twice against RAM once the values are
copied out. Here bytes go from the file into the destination array, a few MB at a time, and are checked for
non-finite values while they are in the processor's cache.
"""

import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.files.buffers import empty
from llama_jax.files.direct import read_parts, reads_directly
from llama_jax.files.foreign_weights import POINTER, is_pointer
from llama_jax.files.reading import fill, open_file, read_bytes

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# of quantized weights
CODE_DTYPES: dict[str, np.dtype] = {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
STORED_DTYPES: dict[str, np.dtype] = {
    **FLOAT_DTYPES,
    **CODE_DTYPES,
    "BOOL": np.dtype(np.bool_),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}

# torch's names of those that quantized weights in its own files have
TORCH_DTYPES = {
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_CHUNK_BYTES = 1 << 22  # small enough to stay in the processor's cache
_CACHED = 1 << 17  # values that stay in the cache of one core


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `nbytes` at `offset`, row-major, little-endian."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class DequantizedTensor(StoredTensor):
    """A weight that is computed from several stored tensors; `path` and `offset` are those of the first.

    Attributes:
        parts: the stored tensors.
        values: computes the weight, in float32; raises ValueError and OSError.
        kept: the same as a `QuantizedWeight`, where one can hold its codes and scales.
    """

    parts: tuple[StoredTensor, ...]
    values: Callable[[], np.ndarray]
    kept: "KeptCodes | None" = None


class KeptCodes(NamedTuple):
    """A weight as a `QuantizedWeight` has it: `tensors` are codes, scale and, with 4 bits, zero."""

    bits: int
    group_size: int | None
    tensors: tuple[DequantizedTensor, ...]


def parts_of(tensor: StoredTensor) -> tuple[StoredTensor, ...]:
    """What is in the files: the parts of a dequantized weight, or the tensor itself."""
    return tensor.parts if isinstance(tensor, DequantizedTensor) else (tensor,)


def stored_dtype(name: str) -> np.dtype:
    """The dtype of a stored tensor; quantized parts may have torch's names for theirs."""
    return STORED_DTYPES[TORCH_DTYPES.get(name, name)]


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, in the order of the header.

    Raises:
        ValueError: not a safetensors file, a truncated one, or an inconsistent header.
    """
    header, start, size = _header(path)
    header.pop("__metadata__", None)
    tensors = [_parse_entry(path, name, entry, start) for name, entry in header.items()]
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise ValueError(f"{path.name}: tensor {tensor.name} overlaps another or leaves a gap")
        end += tensor.nbytes
    if end != size:
        cut = [tensor.name for tensor in tensors if tensor.offset + tensor.nbytes > size]
        problem = f"truncated, {len(cut)} tensors from {cut[0]} on" if cut else "trailing bytes"
        raise ValueError(f"{path.name}: found {size} bytes, expected {end}: {problem}")
    return tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file says of itself: text by name; empty where it says nothing.

    Raises:
        ValueError: as `read_header`.
    """
    metadata = _header(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a file, where its data begin, and its size."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            prefix = read_bytes(file, 8)
            if len(prefix) < 8:
                raise ValueError(f"{path.name}: found {size} bytes, expected a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > min(size - 8, _MAX_HEADER_BYTES):
                file.seek(0)
                if is_pointer(read_bytes(file, 64)):
                    raise ValueError(f"{path.name}: {POINTER}")
                raise ValueError(
                    f"{path.name}: found {size - 8} bytes, expected {length} of the header: truncated, or "
                    "not a safetensors file"
                )
            text = read_bytes(file, length)
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: the header is not a JSON object")
    return header, 8 + length, size


def read_tensor(tensor: StoredTensor, out: np.ndarray) -> bool:
    """Read a tensor of floats or codes into `out`, casting floats to its dtype.

    Args:
        out: C-contiguous, of the tensor's shape.

    Returns:
        Whether every value is finite after the cast; an overflow is not.

    Raises:
        ValueError: the file ends early, because it changed since its header was read.
        OSError: the file cannot be read.
    """
    if isinstance(tensor, DequantizedTensor):
        return _cast(tensor.values(), out)
    source = (FLOAT_DTYPES | CODE_DTYPES)[tensor.dtype]
    assert tensor.dtype in FLOAT_DTYPES or source == out.dtype, "codes are never cast"
    target = out.reshape(-1)
    assert np.shares_memory(target, out), "out has to be contiguous"
    if source == target.dtype and reads_directly(tensor.path, tensor.offset, target):
        return _read_directly(tensor, target)
    step = _CHUNK_BYTES // max(source.itemsize, target.itemsize)
    scratch = None if source == target.dtype else np.empty(min(step, target.size), source)
    finite = True
    with open_file(tensor.path, tensor.offset + tensor.nbytes) as file:
        for begin in range(0, target.size, step):
            part = target[begin : begin + step]
            values = part if scratch is None else scratch[: part.size]
            _read_exactly(file, values, tensor, begin * source.itemsize)
            if scratch is not None:
                with np.errstate(over="ignore", invalid="ignore"):
                    part[...] = values.astype(target.dtype)
            finite = (tensor.dtype in CODE_DTYPES or all_finite(part)) and finite
    return finite


def _read_directly(tensor: StoredTensor, target: np.ndarray) -> bool:
    finite = True
    try:
        for part in read_parts(tensor.path, tensor.offset, target.view(np.uint8)):
            finite = (tensor.dtype in CODE_DTYPES or all_finite(part.view(target.dtype))) and finite
    except EOFError:
        raise _cut(tensor) from None
    return finite


def read_slice(tensor: StoredTensor, index: tuple[slice, ...], out: np.ndarray) -> bool:
    """Read `tensor[index]` into `out`, casting to its dtype.

    Only the requested rows of the first axis are read, a few MB at a time.

    Args:
        index: one slice of step 1 per axis.

    Returns:
        Whether every value is finite after the cast.

    Raises:
        ValueError, OSError: as `read_tensor`.
    """
    if isinstance(tensor, DequantizedTensor):
        return _cast(tensor.values()[index], out)
    source = FLOAT_DTYPES[tensor.dtype]
    rows, rest = range(*index[0].indices(tensor.shape[0])), index[1:]
    row_bytes = math.prod(tensor.shape[1:]) * source.itemsize
    step = max(1, _CHUNK_BYTES // max(row_bytes, 1))
    finite = True
    with open_file(tensor.path, tensor.offset + tensor.nbytes) as file:
        for begin in range(0, len(rows), step):
            count = min(step, len(rows) - begin)
            scratch = np.empty((count, *tensor.shape[1:]), source)
            skip = (rows.start + begin) * row_bytes
            _read_exactly(file, scratch.reshape(-1), tensor, skip)
            part = out[begin : begin + count]
            with np.errstate(over="ignore", invalid="ignore"):
                part[...] = scratch[(slice(None), *rest)].astype(out.dtype)
            finite = all_finite(np.ascontiguousarray(part)) and finite
    return finite


def read_array(tensor: StoredTensor) -> np.ndarray:
    """The values of a stored tensor of any dtype, unchecked.

    Raises:
        ValueError, OSError: as `read_tensor`.
    """
    values = empty(tensor.shape, STORED_DTYPES[tensor.dtype])
    with open_file(tensor.path, tensor.offset + tensor.nbytes) as file:
        _read_exactly(file, values.reshape(-1), tensor, 0)
    return values


def _cast(values: np.ndarray, out: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.astype(out.dtype, copy=False)
    return out.dtype in CODE_DTYPES.values() or all_finite(np.ascontiguousarray(out))


def _read_exactly(file: io.RawIOBase, out: np.ndarray, tensor: StoredTensor, skip: int) -> None:
    file.seek(tensor.offset + skip)
    if fill(file, out.view(np.uint8).data) < out.nbytes:
        raise _cut(tensor)


def _cut(tensor: StoredTensor) -> ValueError:
    return ValueError(f"{tensor.path.name}: ends inside tensor {tensor.name}: truncated")


def all_finite(values: np.ndarray) -> bool:
    """Whether a floating-point array of any dtype has no NaN and no infinity."""
    # Read as integers, positive floats are ordered by value, followed by inf and nan. Negative floats have
    # the sign bit set, so they are ordered in the same way as unsigned integers. Two maxima read each value
    # twice, the second time from the cache, and write nothing: several times faster than np.isfinite.
    if not values.size:
        return True
    size = values.dtype.itemsize
    infinity = int(np.array(np.inf, values.dtype).view(f"i{size}"))
    minus_infinity = int(np.array(-np.inf, values.dtype).view(f"u{size}"))
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CACHED):
        part = flat[start : start + _CACHED]
        if int(part.view(f"i{size}").max()) >= infinity:
            return False
        if int(part.view(f"u{size}").max()) >= minus_infinity:
            return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {duplicate!r}")
    return keys


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        valid = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        nbytes = math.prod(shape) * STORED_DTYPES[dtype].itemsize if valid else -1
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid or end - begin != nbytes:
        raise ValueError(f"{path.name}: the header's entry of tensor {name!r} is damaged")
    return StoredTensor(path, name, dtype, shape, start + begin, nbytes)
