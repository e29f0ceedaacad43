"""The arrays in a file of `flax.serialization`, found without reading them.

MessagePack is a byte for the kind of an object, then its length, then its content. Flax writes nested maps
whose leaves are extension objects of type 1, [shape, dtype, bytes]; arrays of more than 1 GiB are a map of
flat chunks. EasyLM writes a stream of [path, bytes of one such leaf].
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor, all_finite
from llama_jax.files.buffers import empty
from llama_jax.files.reading import file_size, fill, open_file

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ARRAY_EXTENSION = 1
_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST = 32
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class Leaf:
    """An array in a file.

    stored: its name is the path, joined by "/".
    parts: offset and size in bytes of each of its pieces, in order.
    """

    stored: StoredTensor
    parts: tuple[tuple[int, int], ...]

    def read(self) -> np.ndarray:
        """Its values, C-contiguous. Raises ValueError where they are not finite or the file ends early."""
        stored = self.stored
        values = empty(stored.shape, FLOAT_DTYPES[stored.dtype])
        view = values.reshape(-1).view(np.uint8)
        position = 0
        with open_file(stored.path, max(offset + size for offset, size in self.parts)) as file:
            for offset, size in self.parts:
                position = _read_part(file, view, position, offset, size, stored)
        if not all_finite(values):
            raise ValueError(
                f"{stored.path}: {stored.name}: found NaN or infinity, expected finite values"
            )
        return values


def _read_part(
    file: Any, view: np.ndarray, position: int, offset: int, size: int, stored: StoredTensor
) -> int:
    file.seek(offset)
    end = position + size
    if fill(file, view[position:end].data) < size:
        raise ValueError(f"{stored.path}: ends inside {stored.name}: cut short")
    return end


def find_leaves(path: Path) -> dict[str, Leaf]:
    """The arrays in a file, by their paths joined by "/", in the order of the file.

    Raises:
        ValueError: not a file of Flax's, or a damaged or truncated one.
    """
    size = file_size(path)
    with open_file(path) as raw, io.BufferedReader(raw) as file:
        scanner = _Scanner(path, file, size)
        leaves: dict[str, Leaf] = {}
        for name, leaf in scanner.objects():
            if name in leaves:
                raise ValueError(f"{path}: {name}: found twice")
            leaves[name] = leaf
    if not leaves:
        raise ValueError(f"{path}: found no arrays, expected a file of Flax's")
    return leaves


class _Head(NamedTuple):
    """The beginning of an object: its kind and the number of its items or bytes, or its value."""

    kind: str
    value: Any


# the bytes after which a length follows: kind, and struct's format of the length
_LENGTHS = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xC7: ("ext", ">B"),
    0xC8: ("ext", ">H"),
    0xC9: ("ext", ">I"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDC: ("array", ">H"),
    0xDD: ("array", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass
class _Scanner:
    """Walks through a file, from leaf to leaf."""

    path: Path
    file: io.BufferedReader[Any]
    size: int

    def objects(self) -> Iterator[tuple[str, Leaf]]:
        while self.file.tell() < self.size:
            head = self.head()
            if head.kind == "map":
                yield from self.items(head.value, (), 0)
            elif head == _Head("array", 2):
                keys = self.head()
                if keys.kind != "array" or keys.value > _DEEPEST:
                    raise self.damaged("expected the path of an array")
                parts = tuple(self.text() for _ in range(keys.value))
                content = self.head()
                if content.kind != "bin":
                    raise self.damaged("expected the bytes of an array")
                end = self.file.tell() + content.value
                yield from self.value(parts, 0)
                if self.file.tell() != end:
                    raise self.damaged("the bytes of an array do not end where they should")
            else:
                raise self.damaged(f"found {head.kind}, expected a map or a pair")

    def items(self, count: int, above: tuple[str, ...], depth: int) -> Iterator[tuple[str, Leaf]]:
        """The leaves of a map whose beginning has been read."""
        if depth > _DEEPEST:
            raise self.damaged("nested too deeply")
        for number in range(count):
            key = self.text()
            if number == 0 and key == _CHUNKED:
                yield self.chunked(count, above)
                return
            yield from self.value((*above, key), depth)

    def value(self, parts: tuple[str, ...], depth: int) -> Iterator[tuple[str, Leaf]]:
        head = self.head()
        if head.kind == "map":
            yield from self.items(head.value, parts, depth + 1)
        elif head.kind == "ext":
            name = "/".join(parts)
            dtype, shape, part = self.array(head.value)
            yield name, Leaf(self.stored(name, dtype, shape, part), (part,))
        elif head.kind == "str" or head.kind == "bin":
            self.skip(head.value)
        elif head.kind == "array":
            raise self.damaged(f"{'/'.join(parts)}: found a list, expected an array")
        # numbers, of a train state, have been read

    def array(self, length: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        """The dtype, the shape, and offset and size of an array's bytes, which are skipped."""
        kind = self.take(1)[0]
        end = self.file.tell() + length
        if kind != _ARRAY_EXTENSION:  # a scalar of numpy, of a train state: no weight
            self.skip(length)
            return "scalar", (), (end - length, length)
        if self.head() != _Head("array", 3):
            raise self.damaged("expected [shape, dtype, bytes]")
        sizes = self.head()
        if sizes.kind != "array" or sizes.value > 8:
            raise self.damaged("expected a shape")
        shape = tuple(self.integer() for _ in range(sizes.value))
        dtype = self.text()
        content = self.head()
        if content.kind not in ("bin", "str"):
            raise self.damaged("expected the bytes of an array")
        part = self.file.tell(), content.value
        self.skip(content.value)
        if self.file.tell() != end:
            raise self.damaged("an array does not end where it should")
        return dtype, shape, part

    def chunked(self, count: int, parts: tuple[str, ...]) -> tuple[str, Leaf]:
        """An array in pieces: the map after its first key."""
        name = "/".join(parts)
        if count != 3 or self.head().value is not True:
            raise self.damaged(f"{name}: expected the pieces of an array")
        shape: list[int] = []
        chunks: list[tuple[int, int]] = []
        dtypes: set[str] = set()
        for _ in range(2):
            key, inner = self.text(), self.head()
            if inner.kind != "map" or inner.value > 1 << 16:
                raise self.damaged(f"{name}: expected the pieces of an array")
            for number in range(inner.value):
                if self.text() != str(number):
                    raise self.damaged(f"{name}: expected piece {number} of an array")
                if key == "shape":
                    shape.append(self.integer())
                    continue
                head = self.head()
                if key != "chunks" or head.kind != "ext":
                    raise self.damaged(f"{name}: expected the pieces of an array")
                dtype, _, part = self.array(head.value)
                dtypes.add(dtype)
                chunks.append(part)
        if len(dtypes) != 1:
            raise self.damaged(f"{name}: pieces of {len(dtypes)} dtypes")
        whole = chunks[0][0], sum(size for _, size in chunks)
        return name, Leaf(self.stored(name, dtypes.pop(), tuple(shape), whole), tuple(chunks))

    def stored(
        self, name: str, dtype: str, shape: tuple[int, ...], part: tuple[int, int]
    ) -> StoredTensor:
        known = _DTYPES.get(dtype, dtype)
        if known in FLOAT_DTYPES and math.prod(shape) * FLOAT_DTYPES[known].itemsize != part[1]:
            raise self.damaged(f"{name}: found {part[1]} bytes, expected {dtype} {list(shape)}")
        return StoredTensor(self.path, name, known, shape, *part)

    def head(self) -> _Head:
        byte = self.take(1)[0]
        if byte in _CONSTANTS:
            return _Head("constant", _CONSTANTS[byte])
        if byte in _NUMBERS:
            form = _NUMBERS[byte]
            return _Head("number", struct.unpack(form, self.take(struct.calcsize(form)))[0])
        if byte in _LENGTHS:
            kind, form = _LENGTHS[byte]
            length = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        elif byte <= 0x7F or byte >= 0xE0:
            return _Head("number", byte if byte <= 0x7F else byte - 256)
        elif 0xD4 <= byte <= 0xD8:
            kind, length = "ext", 1 << (byte - 0xD4)
        elif byte <= 0x8F:
            kind, length = "map", byte & 0x0F
        elif byte <= 0x9F:
            kind, length = "array", byte & 0x0F
        elif byte <= 0xBF:
            kind, length = "str", byte & 0x1F
        else:
            raise self.damaged(f"found the byte {byte:#x}")
        if length > self.size - self.file.tell():
            raise self.damaged(f"found a length of {length}")
        return _Head(kind, length)

    def text(self) -> str:
        head = self.head()
        if head.kind != "str" or head.value > _LONGEST_NAME:
            raise self.damaged("expected a name")
        try:
            return self.take(head.value).decode()
        except UnicodeDecodeError:
            raise self.damaged("found a name that is not UTF-8") from None

    def integer(self) -> int:
        head = self.head()
        if head.kind != "number" or not isinstance(head.value, int) or head.value < 0:
            raise self.damaged("expected a size")
        return head.value

    def take(self, count: int) -> bytes:
        content = self.file.read(count)
        if len(content) < count:
            raise self.damaged("it ends early")
        return content

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.damaged("it ends early")
        self.file.seek(count, os.SEEK_CUR)

    def damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: damaged, cut short or not Flax's ({what}, before byte {self.file.tell()})"
        )
