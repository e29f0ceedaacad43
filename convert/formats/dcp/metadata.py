"""`.metadata` of a torch distributed checkpoint: which tensors there are, and where their pieces lie.

It is a pickle of torch's dataclasses. It is read without torch: the few classes that torch writes become
records of their fields, dtypes become their names, and a pickle that asks for anything else is refused
before anything is called.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.formatting import first_line

FILE = ".metadata"
_MAX_BYTES = 2**28  # a piece takes 100 bytes: of a model of 1000 tensors on 1000 devices, 100 MB
_CHECKPOINT = "torch.distributed.checkpoint"
_BEFORE_2_3 = (
    "torch.distributed._shard.sharded_tensor.metadata"  # earlier versions have one class there
)


class Piece(NamedTuple):
    """A block of a tensor, and where in a file `torch.save` wrote it."""

    offsets: tuple[int, ...]
    """Of its first item within the tensor."""
    shape: tuple[int, ...]
    file: str
    """In the checkpoint's directory."""
    start: int
    size: int
    """In bytes, from `start` on."""


@dataclass(frozen=True)
class DistributedTensor:
    """A tensor and the pieces that make it up."""

    dtype: str
    """As torch calls it: float32, bfloat16."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def read_metadata(directory: Path) -> dict[str, DistributedTensor]:
    """The tensors of a checkpoint by their names; entries that are no tensors are left out.

    Raises:
        ValueError: a file that is damaged, asks for a class that torch does not write there, names files
            outside the directory, or has tensors whose pieces do not make them up.
    """
    path = directory / FILE
    try:
        content = path.read_bytes() if path.stat().st_size <= _MAX_BYTES else None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if content is None:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {_MAX_BYTES}")
    try:
        metadata = _Unpickler(_Stream(content)).load()
        entries = dict(metadata["state_dict_metadata"])
        places = _places(metadata["storage_data"])
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # pickle raises whatever the damage leads it to
        raise ValueError(
            f"{path}: damaged, cut short or not torch's ({first_line(error)})"
        ) from None
    tensors = {}
    for name, entry in entries.items():
        try:
            if "size" in entry:
                tensors[name] = _tensor(name, entry, places)
        except _RefusedError as error:
            raise ValueError(f"{path}: tensor {name}: {error}") from None
        except Exception as error:
            raise ValueError(
                f"{path}: tensor {name!r:.80}: damaged ({first_line(error)})"
            ) from None
    return tensors


class _RefusedError(Exception):
    """What is wrong, in words for people."""


class _Record(dict[Any, Any]):
    """The fields of one of torch's dataclasses."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)
        elif isinstance(state, tuple) and state:
            self["dtype"] = state[0]  # of TensorProperties, which pickles its fields in order

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)  # while the pickle is read, fields are not there yet


def _nothing(*values: Any) -> None:
    """In place of what is of no use here."""


def _member(*values: Any) -> None:
    """In place of `getattr`, by which the first versions of Python 3.11 pickle an enumeration's member."""
    if len(values) != 2 or values[0] is not _nothing:
        raise _RefusedError(
            "refused: the pickle asks for builtins.getattr of something other than torch's enumerations, "
            "which could run any code"
        )


def _size(dimensions: Sequence[int] = ()) -> tuple[int, ...]:
    return tuple(dimensions)


_RECORDS = {
    f"{_CHECKPOINT}.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo",),
    _BEFORE_2_3: ("TensorProperties",),
}
_CALLED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _nothing,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    (_BEFORE_2_3, "MEM_FORMAT_ENCODING"): _nothing,
    ("builtins", "getattr"): _member,
    ("collections", "OrderedDict"): OrderedDict,
    **dict.fromkeys(  # of StorageMeta: the path that it was saved to
        [("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath")]
        + [("pathlib._local", "PosixPath"), ("pathlib._local", "WindowsPath")],
        _nothing,
    ),
}
_DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "complex64", "complex128"),
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
}


class _Unpickler(pickle.Unpickler):
    """Knows the names that torch writes, and stands in for all of them."""

    def find_class(self, module: str, name: str, /) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        raise _RefusedError(
            f"refused: the pickle asks for {module}.{name}, which torch does not write there and could run "
            "any code"
        )


class _Stream:
    """Bytes to unpickle, without `readinto`: of damaged ones, CPython would print an error of its own."""

    def __init__(self, content: bytes) -> None:
        stream = io.BytesIO(content)
        self.read, self.readline = stream.read, stream.readline


def _places(storage: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Any]:
    """Where pieces lie, by the tensor's name and the piece's offsets."""
    places = {}
    for index, info in storage.items():
        offset = index.get("offset")
        places[str(index["fqn"]), None if offset is None else tuple(offset)] = info
    return places


def _tensor(
    name: str, entry: Mapping[str, Any], places: Mapping[Any, Mapping[str, Any]]
) -> DistributedTensor:
    dtype, shape = entry["properties"]["dtype"], _shape(entry["size"])
    pieces: dict[tuple[int, ...], Piece] = {}
    for chunk in entry["chunks"]:
        offsets, sizes = _shape(chunk["offsets"]), _shape(chunk["sizes"])
        info = places.get((name, offsets)) or places.get((name, None))
        if info is None:
            raise _RefusedError(f"the piece at {list(offsets)} is in no file")
        if info.get("transform_descriptors"):
            raise _RefusedError(
                f"is stored through {', '.join(map(str, info['transform_descriptors']))}, which is not "
                "supported; save it without extensions"
            )
        file = info["relative_path"]
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise _RefusedError(f"is said to be in {file!r:.200}, expected a file of the directory")
        start, size = _shape((info["offset"], info["length"]))
        pieces[offsets] = Piece(offsets, sizes, file, start, size)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _RefusedError(f"found dtype {dtype!r:.80}")
    _require_complete(shape, list(pieces.values()))
    return DistributedTensor(dtype, shape, tuple(pieces.values()))


def _shape(values: Any) -> tuple[int, ...]:
    shape = tuple(values)
    if not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise _RefusedError(f"found {shape!r:.80}, expected sizes")
    return shape


def _require_complete(shape: tuple[int, ...], pieces: list[Piece]) -> None:
    """Raise where the pieces leave a gap, overlap or do not lie within the tensor."""
    rank = len(shape)
    if any(len(p.offsets) != rank or len(p.shape) != rank for p in pieces):
        raise _RefusedError(f"has pieces of another rank than its shape {list(shape)}")
    begins = np.array([p.offsets for p in pieces], np.int64).reshape(len(pieces), rank)
    ends = begins + np.array([p.shape for p in pieces], np.int64).reshape(len(pieces), rank)
    stored = sum(math.prod(p.shape) for p in pieces)
    if stored != math.prod(shape) or (ends > np.array(shape)).any():
        raise _RefusedError(
            f"its {len(pieces)} pieces hold {stored} values, expected all {math.prod(shape)} of shape "
            f"{list(shape)}: a file of another device is missing, or the pieces do not belong together"
        )
    for number in range(1, len(pieces)):
        # two blocks overlap where they do along every axis
        apart = (ends[:number] <= begins[number]) | (begins[:number] >= ends[number])
        if not apart.any(axis=1).all():
            raise _RefusedError(f"its piece at {list(pieces[number].offsets)} overlaps another")
