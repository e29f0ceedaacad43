"""Megatron's indexed datasets: PREFIX.bin with the ids, and PREFIX.idx that says where documents begin.

    9 bytes     "MMIDIDX" and two zeros
    uint64      version, 1
    uint8       code of the ids' dtype
    uint64      sequences
    uint64      document boundaries, documents + 1
    int32 []    length of each sequence, in ids
    int64 []    where each begins in the .bin file, in bytes
    int64 []    the sequence with which each document begins, and the number of sequences
    int8 []     modes of the sequences, of multimodal datasets alone; not used

All little-endian. Source: `_IndexWriter` in megatron/core/datasets/indexed_dataset.py.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.formats.files import list_files
from train.data.tokens import Ends, Tokens, Vocabulary, join_shards
from train.options import TokenOptions

_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

_BLOCK = 1 << 20  # sequences that are checked at a time


def find_files(path: Path) -> list[Path]:
    """The .bin files with an .idx file beside them; `path` may also be the prefix of both, or the .idx."""
    if path.suffix == ".idx" and path.is_file():
        return [path.with_suffix(".bin")]
    prefixed = path.with_name(f"{path.name}.bin")
    if not path.exists() and path.with_name(f"{path.name}.idx").exists():
        return [prefixed]
    indexes = [file.with_suffix(".idx") for file in list_files(path, r"\.(bin|idx)$")]
    return sorted({index.with_suffix(".bin") for index in indexes if index.exists()})


def companions(file: Path) -> list[Path]:
    """The file and its index."""
    return [file, file.with_suffix(".idx")]


def open_files(files: Sequence[Path], vocabulary: Vocabulary, options: TokenOptions) -> Tokens:
    """Memory-map the files.

    Raises:
        ValueError: an index that is damaged, of another version or of ids that are no integers; a .bin file
            that is missing or truncated.
    """
    pairs = [_open(file) for file in files]
    return join_shards(files, [ids for ids, _ in pairs], [ends for _, ends in pairs])


def _open(file: Path) -> tuple[np.ndarray, Ends]:
    index = file.with_suffix(".idx")
    dtype, lengths, pointers, documents = _read_index(index)
    if not file.is_file():
        raise ValueError(f"{file}: no such file, but there is {index}")
    size, expected = file.stat().st_size, 0
    if len(lengths):
        expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if not expected or size != expected:
        raise ValueError(
            f"{file}: found {size} bytes, expected {expected or 'at least one id'} by {index.name}"
        )
    _require_consecutive(index, lengths, pointers, dtype.itemsize)
    ids = np.asarray(np.memmap(file, dtype, mode="r"))

    def ends(start: int, stop: int) -> np.ndarray:
        # not numpy's searchsorted, which would copy arrays that are not aligned, as these
        first, last = (bisect_right(pointers, place * dtype.itemsize) for place in (start, stop))
        begins = documents[bisect_left(documents, first) : bisect_left(documents, last)]
        positions = pointers[begins] // dtype.itemsize
        return np.append(positions, len(ids)) if stop == len(ids) else positions

    return ids, ends


def _read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    """The ids' dtype; lengths of sequences, where they begin, and with which of them documents begin."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header.startswith(_OLD_MAGIC):
        raise ValueError(
            f"{path}: found TNTIDX, the format before Megatron's memory-mapped one, expected MMIDIDX: "
            "preprocess the data with --dataset-impl mmap"
        )
    if not header.startswith(_MAGIC):
        raise ValueError(f"{path}: not an index of Megatron, which begins with MMIDIDX")
    size = path.stat().st_size
    if len(header) < _HEADER.size:
        raise ValueError(
            f"{path}: found {size} bytes, expected a header of {_HEADER.size}: truncated"
        )
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != _VERSION:
        raise ValueError(f"{path}: found version {version}, expected {_VERSION}")
    if code not in _DTYPES:
        known = ", ".join(f"{number} ({name})" for number, name in _DTYPES.items())
        raise ValueError(f"{path}: found dtype code {code}, expected that of integers: {known}")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):
        raise ValueError(
            f"{path}: found {size} bytes, expected {expected} for {sequences} sequences and {boundaries} "
            "boundaries of documents"
        )

    def read(dtype: str, count: int, offset: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)))

    offset = _HEADER.size
    lengths = read("<i4", sequences, offset)
    pointers = read("<i8", sequences, offset + 4 * sequences)
    documents = read("<i8", boundaries, offset + 12 * sequences)
    rising = all(
        bool((part[1:] >= part[:-1]).all())
        for part in (documents[at : at + _BLOCK + 1] for at in range(0, boundaries, _BLOCK))
    )
    if boundaries and not (rising and documents[0] >= 0 and documents[-1] <= sequences):
        raise ValueError(f"{path}: boundaries of documents are not in order: damaged")
    # one that says "no more sequences" is the end of the file
    while len(documents) and documents[-1] == sequences:
        documents = documents[:-1]
    return np.dtype(_DTYPES[code]).newbyteorder("<"), lengths, pointers, documents


def _require_consecutive(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int
) -> None:
    """Raise ValueError unless the sequences fill the file from its start, one after the other."""
    place = 0
    for start in range(0, len(lengths), _BLOCK):
        block = lengths[start : start + _BLOCK].astype(np.int64)
        ends = place + np.cumsum(block * itemsize)
        begins = ends - block * itemsize
        if block.min() < 0 or not np.array_equal(begins, pointers[start : start + _BLOCK]):
            raise ValueError(
                f"{path}: the sequences do not follow one another in the .bin file, as Megatron writes "
                "them: preprocess or merge the data again"
            )
        place = int(ends[-1])
