"""The header of a GGUF file: its metadata and its tensor table, checked before anything is trusted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
`gguf.GGUFReader` reads the same bytes, but it trusts every count and length: a damaged file makes it loop
for hours, allocate without bound, or raise whatever numpy happens to raise. So the header is parsed here,
where no count is followed further than the file is long and every error is a ValueError that names the
file; the gguf library says what the types are and dequantizes their blocks.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_jax.files.foreign_weights import POINTER, is_pointer
from llama_jax.files.reading import file_size, open_file

_SCALARS = {  # metadata value type -> struct format
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MIN_KEY_VALUE = 8 + 4 + 1  # length of an empty key, its type, the smallest value
_MIN_TENSOR = 8 + 4 + 4 + 8  # length of an empty name, dimension count, type, offset
_MAX_ARRAY = 2**24  # elements of an array; the largest vocabularies have 2**18
_BUFFER = 2**20  # bytes read at a time
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor is and how it is stored. `shape` is in NumPy order, rows first."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    path: Path
    offset: int
    """From the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF file but the tensors' data."""

    version: int
    metadata: dict[str, Any]
    """Scalars as Python values (float32 as np.float32, to know its precision), arrays as lists."""
    tensors: dict[str, GgufTensor]
    file_size: int
    """Bytes on disk, of all shards together."""


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, and of the other shards if it is one of several.

    Raises:
        ValueError: anything but a complete, little-endian GGUF file of version 2 or 3.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: {'not a file' if path.exists() else 'not found'}, expected a GGUF file"
        )
    header = _read_file(path)
    shards = header.metadata.get("split.count", 0)
    return _join_shards(path, shards) if shards not in (0, 1) else header


def _join_shards(path: Path, count: Any) -> GgufHeader:
    """All shards NAME-00001-of-0000N.gguf as one header (llama.cpp's gguf-split)."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if not isinstance(count, int) or match is None or int(match[2]) != count:
        raise ValueError(
            f"{path}: is one of {count} shards, expected to be named NAME-00001-of-{count!s:0>5}.gguf"
        )
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if missing := [p.name for p in paths if not p.is_file()]:
        raise ValueError(f"{path.parent}: shards missing: {_few(missing)}")
    headers = [_read_file(p) for p in paths]
    tensors: dict[str, GgufTensor] = {}
    for i, (shard, header) in enumerate(zip(paths, headers, strict=True)):
        position = header.metadata.get("split.no"), header.metadata.get("split.count")
        if position != (i, count):
            raise ValueError(
                f"{shard}: says (split.no, split.count) = {position}, expected {(i, count)}"
            )
        if duplicates := sorted(tensors.keys() & header.tensors.keys()):
            raise ValueError(f"{shard}: tensors that another shard has too: {_few(duplicates)}")
        tensors |= header.tensors
    expected = headers[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ValueError(f"{path}: the shards hold {len(tensors)} tensors, expected {expected}")
    return GgufHeader(
        headers[0].version, headers[0].metadata, tensors, sum(h.file_size for h in headers)
    )


def _read_file(path: Path) -> GgufHeader:
    size = file_size(path)
    if size < 24:
        raise ValueError(f"{path}: {size} bytes, too short for a GGUF file")
    with open_file(path) as raw, io.BufferedReader(raw, _BUFFER) as file:
        try:
            return _parse(path, file, size)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged GGUF header ({error})") from error


def _parse(path: Path, file: io.BufferedReader[Any], size: int) -> GgufHeader:
    if is_pointer(file.peek(64)[:64]):
        raise ValueError(f"{path}: {POINTER}")
    magic, version, tensor_count, key_count = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        raise ValueError(f"{path}: starts with {magic!r}, expected b'GGUF'")
    if version & 0xFFFF == 0:
        raise ValueError(f"{path}: a big-endian GGUF file, expected a little-endian one")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}, expected 2 or 3")

    cursor = _Cursor(path, file, size)
    cursor.check_count("metadata entries", key_count, _MIN_KEY_VALUE)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"{path}: duplicate metadata key {key!r}")
        metadata[key] = cursor.value(key, cursor.scalar("I"))

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a power of two")
    cursor.check_count("tensors", tensor_count, _MIN_TENSOR)
    tensors = [_parse_tensor(path, cursor) for _ in range(tensor_count)]
    start = _align(cursor.position, alignment)
    return GgufHeader(
        version,
        metadata,
        _with_absolute_offsets(path, tensors, start, alignment, size),
        size,
    )


def _parse_tensor(path: Path, cursor: _Cursor) -> GgufTensor:
    """One row of the tensor table; its offset is still relative to the data section."""
    name = cursor.string("a tensor name")
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(
            f"{path}: tensor {name!r} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}"
        )
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]  # stored fastest first
    type_id = cursor.scalar("I")
    try:
        type_ = GGMLQuantizationType(type_id)
        block, block_bytes = GGML_QUANT_SIZES[type_]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path}: tensor {name!r} has type {type_id}, which the gguf library does not know"
        ) from None
    if shape[-1] % block:
        raise ValueError(
            f"{path}: tensor {name!r} has rows of {shape[-1]} values, "
            f"expected a multiple of the {block} values in a block of {type_.name}"
        )
    nbytes = math.prod(shape) // block * block_bytes
    return GgufTensor(name, type_, shape, path, cursor.scalar("Q"), nbytes)


def _with_absolute_offsets(
    path: Path, tensors: list[GgufTensor], start: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """Tensors by name with absolute offsets.

    ggml stores tensors one after another, each padded to the alignment, and refuses anything else; the
    same rule here means that a damaged offset or shape cannot silently read another tensor's bytes.
    """
    by_name: dict[str, GgufTensor] = {}
    expected = 0
    for tensor in tensors:
        if tensor.name in by_name:
            raise ValueError(f"{path}: duplicate tensor {tensor.name!r}")
        if tensor.offset != expected:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} is at offset {tensor.offset}, expected {expected}"
            )
        if start + expected + tensor.nbytes > size:
            raise ValueError(
                f"{path}: {size} bytes, expected at least {start + expected + tensor.nbytes} "
                f"to hold tensor {tensor.name!r}; the file is cut short or damaged"
            )
        by_name[tensor.name] = GgufTensor(
            tensor.name, tensor.type, tensor.shape, path, start + expected, tensor.nbytes
        )
        expected = _align(expected + tensor.nbytes, alignment)
    return by_name


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _few(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _Cursor:
    """A position in the file, after its first 24 bytes, that cannot be moved past its end."""

    def __init__(self, path: Path, file: io.BufferedReader[Any], size: int) -> None:
        self.path, self.file, self.size, self.position = path, file, size, 24

    def take(self, count: int) -> bytes:
        self.position += count
        return self.file.read(count)

    def check_count(self, what: str, count: int, smallest: int) -> None:
        room = self.size - self.position
        if count * smallest > room:
            raise ValueError(
                f"{self.path}: {count} {what} cannot fit in the {room} bytes that follow; "
                "the file is cut short or damaged"
            )

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def string(self, what: str) -> str:
        length = self.scalar("Q")
        self.check_count(f"bytes of {what}", length, 1)
        return self.take(length).decode("utf-8")

    def value(self, key: str, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string(key)
        if type_id == _ARRAY:
            return self.array(key)
        if type_id not in _SCALARS:
            raise ValueError(f"{self.path}: metadata {key!r} has unknown value type {type_id}")
        value = self.scalar(_SCALARS[type_id])
        return np.float32(value) if type_id == _FLOAT32 else value

    def array(self, key: str) -> list[Any]:
        type_id, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ARRAY:
            raise ValueError(
                f"{self.path}: {key} has {count} elements, expected at most {_MAX_ARRAY}"
            )
        if type_id == _STRING:
            self.check_count(f"strings of {key}", count, 8)
            return [self.string(key) for _ in range(count)]
        if type_id not in _SCALARS:
            raise ValueError(f"{self.path}: metadata {key!r} is an array of unknown type {type_id}")
        dtype = np.dtype(_SCALARS[type_id]).newbyteorder("<")
        self.check_count(f"values of {key}", count, dtype.itemsize)
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return list(values) if type_id == _FLOAT32 else values.tolist()
