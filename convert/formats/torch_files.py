"""PyTorch's own files (`.bin`, `.pth`), a tensor at a time.

Since torch 1.6 such a file is a zip: `data.pkl`, which says what tensors there are, and one entry
`data/KEY` of plain numbers for each storage. The pickle is read by `torch.load(weights_only=True)`, from a
copy of the zip in memory whose storages are empty, onto the meta device: no number is touched, and nothing
but Python's `zipfile` parses the file itself. The numbers are then read where they are in the file, and
their CRC-32 is checked. Older files are loaded into memory.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.safetensors_read import (
    FLOAT_DTYPES,
    StoredTensor,
    all_finite,
    stored_dtype,
)
from llama_jax.files.buffers import empty
from llama_jax.files.foreign_weights import POINTER, is_pointer
from llama_jax.files.reading import open_file, read_bytes
from llama_jax.formatting import first_line

OLD_FORM_NOTE = "has the form from before torch 1.6: all of it is held in memory"
_CHUNK = 2**22  # bytes read at a time
_MAX_STRUCTURE = 2**28  # bytes of pickle or directory: a model of 100,000 tensors has 20 MB
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # where trainers put the tensors
STORED_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}


@dataclass(frozen=True)
class TorchFile:
    """The tensors of one file: what they are, and what reads one."""

    tensors: Mapping[str, StoredTensor]
    """By name, in the file's order."""
    load: Callable[..., np.ndarray]
    """`load(name, rows=None, out=None)`: the values, or those of the first `rows` rows, in `out` if it
    is given; raises ValueError."""
    in_memory: bool = False
    """Whether all of the file is held in memory: it has the form from before torch 1.6."""


@dataclass(frozen=True)
class _Location:
    """Where a tensor's numbers are: the storage's entry, offset and strides in items, as torch has them."""

    entry: zipfile.ZipInfo
    offset: int
    strides: tuple[int, ...]


def open_torch_file(path: Path, *, tree: bool = False) -> TorchFile:
    """The tensors in a file that `torch.save` wrote: a dictionary of them by name.

    Args:
        tree: whether it may be any tree: keys are joined by ".", and what is no tensor is left out.

    Raises ValueError for a file that is damaged or cut short, a pickle that asks for anything but
    tensors, and torch not installed.
    """
    require_torch()
    try:
        with _Bounded(path) as file:
            if zipfile.is_zipfile(file):
                return _open_zip(path, file, tree=tree)
            file.seek(0)
            if is_pointer(file.read(64)):
                raise ValueError(f"{path.name}: {POINTER}")
            return _open_old_form(path, file, tree)
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def open_torch_tensor(path: Path, name: str, offset: int, size: int) -> TorchFile:
    """The one tensor that `torch.save` wrote into the `size` bytes of a file from `offset` on.

    Args:
        name: what to call it.

    Raises ValueError as `open_torch_file` does.
    """
    require_torch()
    try:
        with _Bounded(path, offset, size) as file:
            return _open_zip(path, file, name)
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read ({error.strerror or error})") from None


def require_torch() -> None:
    """Raise ValueError where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError(
            "PyTorch's files: torch is not installed; in the checkout: pip install '.[parity]'"
        ) from None


class _Bounded(io.RawIOBase):
    """A part of a file, as if it were one.

    One read allocates no more than the part holds, or than a structure of tensors can take.
    """

    def __init__(self, path: Path, start: int = 0, size: int | None = None) -> None:
        self._file = open_file(path, None if size is None else start + size)
        self.start = start
        self.size = self._file.seek(0, os.SEEK_END) - start if size is None else size
        self.seek(0)

    def close(self) -> None:
        self._file.close()
        super().close()

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError(f"a position of {base + offset}")
        return self._file.seek(self.start + base + offset) - self.start

    def tell(self) -> int:
        return self._file.tell() - self.start

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_STRUCTURE:
            raise ValueError(f"a part of {size} bytes, expected at most {_MAX_STRUCTURE}")
        return read_bytes(self._file, size)


def _open_zip(
    path: Path, file: _Bounded, only: str | None = None, *, tree: bool = False
) -> TorchFile:
    """The tensors of a zip: by their names or, with the name `only`, the one that is all of it."""
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(entries) != len(archive.infolist()) or len(pickles) != 1:
            raise ValueError(f"{len(pickles)} entries NAME/data.pkl, expected one")
        top = pickles[0].removesuffix("data.pkl")
        if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries.values()):
            raise ValueError("its entries are compressed or encrypted, torch.save does neither")
        order = entries.get(f"{top}byteorder")
        if order is not None and (byte_order := _content(file, order)) != b"little":
            raise ValueError(f"byte order {byte_order[:10]!r}, expected b'little'")
        skeleton = io.BytesIO()
        by_offset: dict[int, zipfile.ZipInfo] = {}
        with zipfile.ZipFile(skeleton, "w") as copy:
            copy.writestr(f"{top}data.pkl", _content(file, entries[pickles[0]]))
            copy.writestr(f"{top}version", "3\n")
            for name, info in entries.items():
                if name.startswith(f"{top}data/"):
                    copy.writestr(name, b"")
                    by_offset[skeleton.tell()] = info
    except Exception as error:  # zipfile raises whatever the damage leads it to
        raise ValueError(f"{path.name}: damaged or cut short ({first_line(error)})") from None
    tensors: dict[str, StoredTensor] = {}
    locations: dict[str, _Location] = {}
    for name, tensor in _state_dict(path, skeleton, "meta", only, tree=tree).items():
        entry = by_offset.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", -1))
        if entry is None:
            raise ValueError(f"{path.name}: tensor {name}: its numbers are not in the file")
        location = _Location(entry, tensor.storage_offset(), tuple(tensor.stride()))
        tensors[name] = stored = _described(path, name, tensor, file.start + entry.header_offset)
        if problem := _problem(stored, location, tensor.element_size(), file.size):
            raise ValueError(f"{path.name}: tensor {name}: {problem}")
        locations[name] = location
    return TorchFile(tensors, _Reader(tensors, locations, (file.start, file.size)).load)


def _open_old_form(path: Path, file: _Bounded, tree: bool) -> TorchFile:
    values = _state_dict(path, file, "cpu", tree=tree)
    tensors = {name: _described(path, name, tensor, 0) for name, tensor in values.items()}

    def load(name: str, rows: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        import torch

        tensor = values[name].detach()
        tensor = tensor if rows is None else tensor[:rows]
        copy = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
        raw = copy.view(torch.uint8).numpy().view(stored_dtype(tensors[name].dtype))
        return _placed(_finite(tensors[name], raw.reshape(tuple(tensor.shape))), out)

    return TorchFile(tensors, load, in_memory=True)


def _content(file: _Bounded, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of an entry that is no tensor."""
    file.seek(_data_offset(file, entry))
    content = file.read(entry.file_size)
    if len(content) != entry.file_size or entry.CRC not in (0, zlib.crc32(content)):
        raise ValueError(f"CRC-32 mismatch in {entry.filename}")
    return content


def _state_dict(
    path: Path,
    source: Any,
    device: str,
    only: str | None = None,
    *,
    tree: bool = False,
) -> dict[str, Any]:
    """What torch loads from a file, if it is tensors by name and nothing else.

    Args:
        source: a stream of the file.
        only: the name of the tensor that is all of it.
    """
    import torch

    source.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(source, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads it to
        raise ValueError(f"{path.name}: {_reason(error)}") from None
    if only is not None:
        loaded = {only: loaded}
    elif tree and isinstance(loaded, dict):
        leaves = _leaves(loaded)
        loaded = {name: leaf for name, leaf in leaves if isinstance(leaf, torch.Tensor)}
    elif isinstance(loaded, dict):
        # trainers save the tensors in a dictionary of their own, beside their state
        nested = [loaded[key] for key in _NESTED if isinstance(loaded.get(key), dict)]
        loaded = nested[0] if nested else loaded
    if not isinstance(loaded, dict):
        raise ValueError(f"{path.name}: holds a {type(loaded).__name__}, expected tensors by name")
    for name, tensor in loaded.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor):
            what = f"a {type(tensor).__name__}"
            key = repr(name) if type(name) is str else f"a {type(name).__name__}"
            raise ValueError(f"{path.name}: holds {what} under {key}, expected tensors by name")
        if tensor.layout != torch.strided or any(
            (tensor.is_quantized, tensor.is_nested, tensor.is_conj(), tensor.is_neg())
        ):
            raise ValueError(f"{path.name}: tensor {name} is sparse or quantized, expected plain")
    return loaded


def _leaves(tree: Mapping[Any, Any], above: str = "", depth: int = 8) -> Iterator[tuple[str, Any]]:
    """What a tree of dictionaries holds, by its keys joined by "."."""
    for key, value in tree.items():
        if isinstance(value, dict) and depth:
            yield from _leaves(value, f"{above}{key}.", depth - 1)
        else:
            yield f"{above}{key}", value


def _reason(error: Exception) -> str:
    """torch's many lines of advice as one of fact."""
    text = str(error)
    if (start := text.find("GLOBAL ")) >= 0:
        requested = text[start:].split()[1]
        return (
            f"refused: the pickle asks for {requested}, which is no tensor and could run any code"
        )
    # after its advice on weights_only comes what was wrong
    lines = text.split("WeightsUnpickler error: ")[-1].strip().splitlines()
    return (
        f"damaged, cut short or not PyTorch's ({lines[0][:200] if lines else type(error).__name__})"
    )


def _described(path: Path, name: str, tensor: Any, offset: int) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    nbytes = tensor.numel() * tensor.element_size()
    return StoredTensor(
        path, name, STORED_DTYPES.get(dtype, dtype), tuple(tensor.shape), offset, nbytes
    )


def _problem(
    tensor: StoredTensor, location: _Location, itemsize: int, file_size: int
) -> str | None:
    """What is wrong with a tensor's location in its storage."""
    entry = location.entry
    if not 0 <= entry.header_offset <= file_size - entry.file_size:
        return f"{entry.file_size} bytes at {entry.header_offset} of a file of {file_size}"
    if min((location.offset, *location.strides)) < 0 or tensor.nbytes > file_size:
        return f"shape {list(tensor.shape)}, more than the file holds"
    end = _span(tensor.shape, location) * itemsize
    if end > entry.file_size:
        return f"found {entry.file_size} bytes of numbers, expected {end}: damaged or cut short"
    return None


def _span(shape: tuple[int, ...], location: _Location) -> int:
    """One past the last item of a storage that a tensor uses."""
    if 0 in shape:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(shape, location.strides, strict=True))
    return location.offset + last + 1


@dataclass(frozen=True)
class _Reader:
    """Reads tensors of a zip. A storage is read to its end, and its CRC checked, at its first tensor."""

    tensors: Mapping[str, StoredTensor]
    locations: Mapping[str, _Location]
    part: tuple[int, int]
    """Where in the file the zip begins, and how many bytes it has."""
    checked: set[str] = field(default_factory=set)

    def load(self, name: str, rows: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The values of a tensor, C-contiguous; or of its first `rows` rows, unchecked.

        Args:
            out: where they are to be, of their dtype and shape.
        """
        tensor, location = self.tensors[name], self.locations[name]
        dtype = stored_dtype(tensor.dtype)
        shape = tensor.shape if rows is None else (min(rows, tensor.shape[0]), *tensor.shape[1:])
        if 0 in shape:
            return np.empty(shape, dtype)
        count = _span(shape, location) - location.offset
        if out is not None and out.flags.c_contiguous and out.size == count:
            flat = out.reshape(-1)
        else:
            flat = empty((count,), dtype)
        check = rows is None and location.entry.filename not in self.checked
        try:
            with _Bounded(tensor.path, *self.part) as file:
                _read(file, location, flat, check=check)
        except (OSError, ValueError) as error:
            raise ValueError(f"{tensor.path}: tensor {name}: {first_line(error)}") from None
        if check:
            self.checked.add(location.entry.filename)
        strides = tuple(stride * dtype.itemsize for stride in location.strides)
        values = np.asarray(np.lib.stride_tricks.as_strided(flat, shape, strides), order="C")
        return _placed(_finite(tensor, values), out)


def _placed(values: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """`values`, in `out` if there is one."""
    if out is None or np.may_share_memory(values, out):
        return values
    out[...] = values
    return out


def _read(file: _Bounded, location: _Location, flat: np.ndarray, *, check: bool) -> None:
    """Fill `flat` with a stretch of a storage; with `check`, read all of it and compare its CRC-32.

    A CRC of 0 is what writers leave that compute none (torch.serialization.set_crc32_options).
    """
    entry, out = location.entry, flat.view(np.uint8)
    begin = location.offset * flat.itemsize
    check = check and entry.CRC != 0
    position, end = (0, entry.file_size) if check else (begin, begin + out.size)
    crc, buffer = 0, np.empty(min(_CHUNK, end - position), np.uint8)
    file.seek(_data_offset(file, entry) + position)
    while position < end:
        count = file.readinto(buffer[: end - position].data) or 0
        if not count:
            raise ValueError("the file ends inside it: cut short")
        chunk = buffer[:count]
        crc = zlib.crc32(chunk.data, crc) if check else 0
        low, high = max(position, begin), min(position + count, begin + out.size)
        if low < high:
            out[low - begin : high - begin] = chunk[low - position : high - position]
        position += count
    if check and crc != entry.CRC:
        raise ValueError(f"its bytes have CRC-32 {crc:08x}, expected {entry.CRC:08x}: damaged")


def _data_offset(file: _Bounded, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: after its local header, whose padding only that header tells."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"no zip entry {entry.filename} where the directory says")
    name, extra = struct.unpack("<HH", header[26:])
    return entry.header_offset + 30 + name + extra


def _finite(tensor: StoredTensor, values: np.ndarray) -> np.ndarray:
    if tensor.dtype in FLOAT_DTYPES and not all_finite(values):
        with np.errstate(invalid="ignore"):  # some NaNs of bfloat16 signal
            count = int(values.size - np.isfinite(values).sum())
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name}: {count} values are NaN or infinite, expected none"
        )
    return values
