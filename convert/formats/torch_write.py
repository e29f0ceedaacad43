"""Write files that `torch.load` reads, a tensor at a time.

`torch.save` needs all tensors at once. Such a file is a zip of uncompressed entries, so it is written here:
first `data.pkl`, which names torch's own rebuilding functions and the storages, then the storages one after
another, each at a multiple of 64 bytes, where torch puts them so that they can be mapped into memory.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_ALIGNMENT = 64
_CHUNK = 2**26  # bytes per write
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


class Storage(NamedTuple):
    """The entry `data/KEY`, which holds one tensor."""

    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def write_torch_file(
    file: BinaryIO,
    top: str,
    tensors: Mapping[str, Storage] | Storage,
    storages: Sequence[Storage],
    parts: Callable[[int], Iterable[np.ndarray]],
    progress: Callable[[int], None],
) -> None:
    """Write what `torch.load(weights_only=True)` reads as tensors by name, or as one tensor.

    Args:
        file: new, open for writing and reading.
        top: the directory within the zip; torch takes the file's name without its suffix.
        tensors: by name; several names may share a storage.
        storages: all of them, in the order in which they are written.
        parts: the values of a storage, by its number, as arrays that follow each other.
        progress: is called with the number of bytes just written.

    Raises:
        OSError: the disk is full or broken; also whatever `parts` raises.
    """
    with zipfile.ZipFile(file, "w") as archive:
        small: dict[str, bytes] = {
            "data.pkl": _pickled(tensors),
            "byteorder": b"little",
            "version": b"3\n",
        }
        for name, content in small.items():
            _write_entry(archive, f"{top}/{name}", [np.frombuffer(content, np.uint8)])
        for number, storage in enumerate(storages):
            _write_entry(archive, f"{top}/data/{storage.key}", parts(number), progress)


class _Tensor:
    """A storage as one tensor, to be pickled the way torch pickles its own."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        from torch._utils import _rebuild_tensor_v2

        shape = self.storage.shape
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return _rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Storages are named, not pickled, as `torch.save` has it."""

    def persistent_id(self, value: Any) -> Any:
        import torch

        if not isinstance(value, Storage):
            return None
        kind = getattr(torch, _STORAGES[str(value.dtype)])
        return "storage", kind, value.key, "cpu", math.prod(value.shape)


def _pickled(tensors: Mapping[str, Storage] | Storage) -> bytes:
    """The pickle that torch rebuilds the tensors from."""
    value: Any
    if isinstance(tensors, Storage):
        value = _Tensor(tensors)
    else:
        wrapped = {storage: _Tensor(storage) for storage in tensors.values()}
        value = {name: wrapped[storage] for name, storage in tensors.items()}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def _write_entry(
    archive: zipfile.ZipFile,
    name: str,
    parts: Iterable[np.ndarray],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Add an entry whose bytes begin at a multiple of 64; zipfile adds their CRC-32."""
    entry = zipfile.ZipInfo(name)
    assert archive.fp is not None
    header = 30 + len(entry.filename) + 4 + 20  # the padding has a head of 4, zip64's sizes take 20
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as file:
        for values in parts:
            content = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            for start in range(0, len(content), _CHUNK):
                progress(file.write(content[start : start + _CHUNK]))
            del values, content  # before the next is read
