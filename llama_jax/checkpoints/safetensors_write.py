"""Write safetensors files, one tensor at a time.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's
length N as little-endian uint64; N bytes of JSON, padded with spaces; then the tensors' bytes, C order,
little-endian, without gaps. A large model is split into several such files, and
`model.safetensors.index.json` says which tensor is in which file.

The data begins with a page of the system, and tensors of complete pages come first in it, so that a reader
can map them (`llama_jax.files.mapping`).

The `safetensors` library writes a dict of all tensors, which a converter cannot hold in memory. Here names,
shapes and dtypes come first, and values are requested one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama_jax.files.direct import DirectWriter
from llama_jax.files.page import PAGE
from llama_jax.files.page_cache import fits_page_cache
from llama_jax.files.staging import remove_stale, staging_in

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

_CHUNK_BYTES = 64 * 2**20  # per write: large enough to be fast, small enough to show progress


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor, known before its values are read."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.size * self.dtype.itemsize


def plan_shards(
    specs: Sequence[TensorSpec], max_shard_size: int = 5_000_000_000
) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in the order of `specs`, at most `max_shard_size` bytes of data per file.

    A single tensor larger than that gets its own file, as in Hugging Face.

    Raises:
        ValueError: a size that is not positive, a duplicate or reserved name, an unsupported dtype.

    >>> specs = [TensorSpec(name, np.dtype(np.float32), (10,)) for name in "abc"]
    >>> for file, tensors in plan_shards(specs, max_shard_size=80).items():
    ...     print(file, [spec.name for spec in tensors])
    model-00001-of-00002.safetensors ['a', 'b']
    model-00002-of-00002.safetensors ['c']
    """
    if max_shard_size <= 0:
        raise ValueError(
            f"max_shard_size: found {max_shard_size}, expected a positive number of bytes"
        )
    problems = []
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen or spec.name == "__metadata__":
            problems.append(f"tensor name {spec.name!r} is duplicate or reserved")
        if np.dtype(spec.dtype) not in DTYPE_NAMES:
            problems.append(f"tensor {spec.name}: safetensors has no dtype {spec.dtype}")
        seen.add(spec.name)
    if problems:
        raise ValueError("; ".join(problems))

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
    """Write `specs` into `directory`, calling `load(name)` for each tensor's values when it is due.

    Writes `model.safetensors`, or several files with an index if the data exceeds `max_shard_size` bytes.
    Values are requested in order and one at a time, so no more than one tensor is in memory.

    The files are renamed into `directory` once all are complete, so a failure leaves it unchanged; weight
    files of an earlier save are removed afterwards, because a reader would mix the two. Files may not be
    flushed to disk yet, see `staging.to_disk`.

    Args:
        progress: called with the number of bytes just written.

    Returns:
        The written files, the index last.

    Raises:
        ValueError: values of another dtype or shape than their spec, or as `plan_shards`.
    """
    directory = Path(directory)
    shards = plan_shards(specs, max_shard_size)
    with staging_in(directory, SINGLE_FILE) as staging:
        direct = not fits_page_cache(sum(spec.nbytes for spec in specs))
        for name, members in shards.items():
            write_file(staging / name, members, load, progress=progress, direct=direct)
        names = list(shards)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
                "weight_map": {s.name: file for file, members in shards.items() for s in members},
            }
            (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
            names.append(INDEX_FILE)
        for name in names:
            os.replace(staging / name, directory / name)
    written = [directory / name for name in names]
    remove_stale(directory, keep=written)
    return written


def write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    load: Callable[[str], np.ndarray],
    *,
    progress: Callable[[int], None] | None = None,
    direct: bool = False,
) -> None:
    """Write one file at `path`, as `write_safetensors` does but for the renaming.

    Args:
        direct: write past the page cache, which a large checkpoint would only fill.
    """
    offsets = _offsets(specs)
    with DirectWriter(path) if direct else path.open("wb") as file:
        header = _header(specs, offsets)
        file.write(header)
        for spec in specs:
            file.seek(len(header) + offsets[spec.name])
            _write_tensor(file, spec, load(spec.name), progress)


def _offsets(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Where in the data each tensor begins: first those of complete pages."""
    offsets, end = {}, 0
    for spec in sorted(specs, key=lambda spec: spec.nbytes % PAGE != 0):
        offsets[spec.name] = end
        end += spec.nbytes
    return offsets


def _header(specs: Iterable[TensorSpec], offsets: Mapping[str, int]) -> bytes:
    """Length, JSON and padding: everything before the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec in specs:
        begin = offsets[spec.name]
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[np.dtype(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(
    file: BinaryIO | DirectWriter,
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
    for start in range(0, len(view), _CHUNK_BYTES):
        written = file.write(view[start : start + _CHUNK_BYTES])
        if progress is not None:
            progress(written)
