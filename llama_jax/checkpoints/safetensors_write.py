"""Safetensors files: tensors streamed to disk one at a time.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's
length N as little-endian uint64; N bytes of JSON, padded with spaces so that the data begins at a
multiple of eight; then the tensors' bytes, C order, little-endian, without gaps. A model larger than
one file is a row of such files with `model.safetensors.index.json`, which says what lies where.

The `safetensors` library writes from a dict of all tensors at once. A converter cannot hold that, so
the writing is done here: shapes and dtypes are stated first, the values are asked for one by one.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama_jax.files.staging import remove_stale

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_NAMES: dict[np.dtype[Any], str] = {
    np.dtype(dtype): name
    for dtype, name in [
        (np.bool_, "BOOL"),
        (np.uint8, "U8"),
        (np.int8, "I8"),
        (np.uint16, "U16"),
        (np.int16, "I16"),
        (np.uint32, "U32"),
        (np.int32, "I32"),
        (np.uint64, "U64"),
        (np.int64, "I64"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
        (np.complex64, "C64"),
    ]
}

_CHUNK = 64 * 2**20  # bytes per write: large enough to be fast, small enough to show progress


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, before its values are read: name, dtype, shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes of data."""
        return self.size * self.dtype.itemsize


def plan_shards(
    specs: Sequence[TensorSpec], max_shard_size: int = 5_000_000_000
) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in the given order; no file above `max_shard_size` bytes of data.

    A single tensor larger than that has a file of its own, as in Hugging Face's own sharding.
    Raises ValueError for a size that is not positive, a name given twice, a dtype the format lacks.
    """
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes")
    faults = []
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen or spec.name == "__metadata__":
            faults.append(f"tensor name {spec.name!r} is given twice or reserved")
        if np.dtype(spec.dtype) not in DTYPE_NAMES:
            faults.append(f"tensor {spec.name}: safetensors has no dtype {spec.dtype}")
        seen.add(spec.name)
    if faults:
        raise ValueError("; ".join(faults))

    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def write_safetensors(
    directory: Path,
    specs: Sequence[TensorSpec],
    load: Callable[[str], np.ndarray],
    *,
    max_shard_size: int = 5_000_000_000,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write `specs` into `directory`, asking `load(name)` for each tensor's values when it is due.

    One file, `model.safetensors`, or several with an index when the data exceeds `max_shard_size`
    bytes. Tensors are asked for in the given order and one at a time, so no more than one is alive.
    `progress` is told the number of bytes just written.

    Every file is written beside its final name and renamed only when all are complete, so a failure leaves
    `directory` as it was; files of an earlier, differently sharded save are removed afterwards, because a
    reader would mix the two. Returns the paths written, the index last. They may not be on the disk yet:
    see `staging.to_disk`.

    Raises ValueError for a tensor whose values have another dtype or shape than its spec, and for
    what `plan_shards` refuses.
    """
    directory = Path(directory)
    shards = plan_shards(specs, max_shard_size)
    temporary: dict[Path, Path] = {}
    try:
        for name, members in shards.items():
            temporary[directory / name] = path = directory / f".{name}.{os.getpid()}.tmp"
            with path.open("wb") as file:
                file.write(_header(members))
                for spec in members:
                    _write_tensor(file, spec, load(spec.name), progress)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
                "weight_map": {s.name: file for file, members in shards.items() for s in members},
            }
            temporary[directory / INDEX_FILE] = path = (
                directory / f".{INDEX_FILE}.{os.getpid()}.tmp"
            )
            with path.open("wb") as file:
                file.write((json.dumps(index, indent=2) + "\n").encode())
        for final, path in temporary.items():
            os.replace(path, final)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    remove_stale(directory, keep=temporary)
    return list(temporary)


def _header(specs: Iterable[TensorSpec]) -> bytes:
    """Length, JSON and padding: everything before the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(
    file: BinaryIO,
    spec: TensorSpec,
    values: np.ndarray,
    progress: Callable[[int], None] | None,
) -> None:
    if values.dtype != spec.dtype or values.shape != spec.shape:
        raise ValueError(
            f"tensor {spec.name}: found {values.dtype}{list(values.shape)}, "
            f"expected {spec.dtype}{list(spec.shape)}"
        )
    # A byte view writes straight from the array; bfloat16 has no buffer protocol of its own.
    view = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    for start in range(0, len(view), _CHUNK):
        written = file.write(view[start : start + _CHUNK])
        if progress is not None:
            progress(written)
