"""ArrayRecord files, each record the ids of one document.

A record is the ids themselves, little-endian, of `--tokens.dtype`, by default uint16, or uint32 if the
vocabulary needs it; or a serialized tf.train.Example with the ids as a feature, an int64_list. Records are
compressed, so they are read one by one rather than mapped. How many ids each has is counted when a file is
read first, and kept in the cache (`llama_jax.files.user_cache`).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.files.staging import replacing
from llama_jax.files.user_cache import cache_directory
from train.data.formats.example import example_features, int64_values
from train.data.formats.files import list_files
from train.data.formats.masks import MASKS
from train.data.token_shards import token_dtype
from train.data.tokens import Tokens, Vocabulary, join_shards, listed_ends
from train.options import TokenOptions

_BATCH = 1 << 10  # records that are read at a time

Decode = Callable[[bytes], np.ndarray]


def find_files(path: Path) -> list[Path]:
    """Files with .array_record or .arrayrecord in their names, as in NAME.array_record-00000-of-00010."""
    return list_files(path, r"\.array_?record(-\d+-of-\d+)?$")


def companions(file: Path) -> list[Path]:
    """The file alone."""
    return [file]


def open_files(files: Sequence[Path], vocabulary: Vocabulary, options: TokenOptions) -> Tokens:
    """Open the files, and count the ids of their records if they are new.

    Raises:
        ValueError: a file that is damaged, or records of another kind or dtype.
    """
    dtype = options.dtype or token_dtype(vocabulary.vocab_size)
    shards = [_open(file, dtype, options.column) for file in files]
    hint = f"; if its ids are not {dtype}, name their dtype with --tokens.dtype"
    tokens = join_shards(files, shards, [listed_ends(shard.ends) for shard in shards])
    return replace(tokens, hint=hint)


@dataclass(frozen=True)
class _Records:
    """The ids of all records, one after the other.

    ends: [records] int64, where each record's ids end.
    """

    file: Path
    reader: Any
    decode: Decode
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice, /) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        begin = int(self.ends[first - 1]) if first else 0
        records = _read(self.file, self.reader, int(first), int(last) + 1)
        ids = np.concatenate([self.decode(record) for record in records])
        return ids[start - begin : stop - begin]


def _open(file: Path, dtype: str, column: str) -> _Records:
    from array_record.python.array_record_module import ArrayRecordReader

    # random reads: nothing is read ahead
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
    count = reader.num_records()
    if not reader.ok() or not count:
        raise ValueError(f"{file}: not an ArrayRecord file, truncated, or without records")
    (first,) = _read(file, reader, 0, 1)
    if example_features(first) is not None:

        def decode(record: bytes) -> np.ndarray:
            features = example_features(record) or {}
            ids = features.get(column)
            if ids is None:
                raise ValueError(
                    f"{file}: found a tf.train.Example with {', '.join(features) or 'nothing'}, expected "
                    f"an int64_list {column!r}: name that of the ids with --tokens.column"
                )
            _require_all_in_loss(file, features)
            return int64_values(ids)

    else:

        def decode(record: bytes) -> np.ndarray:
            itemsize = np.dtype(dtype).itemsize
            if len(record) % itemsize:
                raise ValueError(
                    f"{file}: found a record of {len(record)} bytes, expected a multiple of {itemsize} for "
                    f"{dtype}: of another --tokens.dtype?"
                )
            return np.frombuffer(record, np.dtype(dtype).newbyteorder("<"))

        start = decode(first)
        if len(start) >= 16 and not start[1::2].any() and start[::2].any():
            raise ValueError(
                f"{file}: every other {dtype} is 0, so the ids are wider: name their dtype with "
                "--tokens.dtype"
            )
    ends = _cached_ends(file, f"{dtype}\0{column}", lambda: _count(file, reader, decode, count))
    if len(ends) != count or not ends[-1]:
        raise ValueError(f"{file}: contains no ids")
    return _Records(file, reader, decode, ends)


def _require_all_in_loss(file: Path, features: Mapping[str, memoryview | None]) -> None:
    """Raise ValueError for a loss mask or padding, which only Arrow files may have."""
    for name, masked in MASKS.items():
        values = features.get(name)
        if values is not None and (int64_values(values) == masked).any():
            raise ValueError(
                f"{file}: found {masked} in {name!r}, ids that are not in the loss: such masks are read "
                "from Arrow files, not from ArrayRecord"
            )


def _read(file: Path, reader: Any, first: int, last: int) -> list[bytes]:
    try:
        records = reader.read(first, last)
    except (RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: damaged ArrayRecord file ({reason})") from None
    return list(records)


def _count(file: Path, reader: Any, decode: Decode, count: int) -> np.ndarray:
    lengths = [
        len(decode(record))
        for first, last in pairwise([*range(0, count, _BATCH), count])
        for record in _read(file, reader, first, last)
    ]
    return np.cumsum(lengths, dtype=np.int64)


def _cached_ends(file: Path, meaning: str, count: Callable[[], np.ndarray]) -> np.ndarray:
    """What `count` returns, kept for as long as the file has this name, size and time of change."""
    status = file.stat()
    key = f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{meaning}"
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    cached = cache_directory(str(file)) / f"array-record-{digest[:32]}.npy"
    with suppress(OSError, ValueError):
        return np.load(cached, mmap_mode="r", allow_pickle=False)
    ends = count()
    with suppress(OSError):  # a cache that cannot be written costs time, no more
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as staged, staged.open("wb") as opened:
            np.save(opened, ends, allow_pickle=False)
    return ends
