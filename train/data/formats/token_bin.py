"""Token files `.bin`: bare ids, as nanoGPT writes them, and llm.c's, with a header of 256 int32.

llm.c's header has a magic number, a version and the number of ids; the rest of it is 0. Two are known:
GPT-2's, with uint16 ids, and Llama 3's, with uint32. A bare file says nothing about itself: its ids are of
`--tokens.dtype`, by default uint16, or uint32 if the vocabulary needs it. In both, an end- or
beginning-of-text id separates documents, which may go on in the next file.

Sources: `write_datafile` in llm.c/dev/data/data_common.py, nanoGPT/data/openwebtext/prepare.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.formats.files import list_files
from train.data.token_shards import token_dtype
from train.data.tokens import Tokens, Vocabulary, delimited_ends, join_shards
from train.options import TokenOptions

_HEADER = 256 * 4  # bytes


class _Kind(NamedTuple):
    version: int
    dtype: str


_MAGIC = {20240520: _Kind(1, "uint16"), 20240801: _Kind(7, "uint32")}
_EVALUATION = 20240522  # llm.c's multiple-choice questions

# what files with the same ending begin with that are no bare ids, although they might be read as such
_OTHERS = {b"\x93NUMPY": "a NumPy file", b"PK\3\4": "a zip archive, such as PyTorch's"}


def find_files(path: Path) -> list[Path]:
    """Files that end with .bin and have no .idx beside them."""
    return [file for file in list_files(path, r"\.bin$") if not file.with_suffix(".idx").exists()]


def companions(file: Path) -> list[Path]:
    """The file alone."""
    return [file]


def open_files(files: Sequence[Path], vocabulary: Vocabulary, options: TokenOptions) -> Tokens:
    """Memory-map the files.

    Raises:
        ValueError: a file that is truncated, of another dtype or of an unknown version of llm.c's.
    """
    kinds = [_kind_of(file) for file in files]
    bare = options.dtype or token_dtype(vocabulary.vocab_size)
    shards = [
        _map_bare(file, bare) if kind is None else _map_with_header(file, kind)
        for file, kind in zip(files, kinds, strict=True)
    ]
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    # llm.c puts the token before a document, nanoGPT after it
    boundary = options.boundary or ("eos" if None in kinds and eos is not None else "bos")
    first, second = (bos, eos) if boundary == "bos" else (eos, bos)
    delimiter = second if first is None else first
    assert delimiter is not None
    tokens = join_shards(files, shards, delimited_ends(delimiter, before=boundary == "bos"))
    hint = f"; if its ids are not {bare}, name their dtype with --tokens.dtype"
    return replace(tokens, delimiter=delimiter, hint=hint if None in kinds else "")


def _kind_of(file: Path) -> _Kind | None:
    """The kind of llm.c's file; None for bare ids."""
    with file.open("rb") as opened:
        start = opened.read(8)
    if len(start) < 8:
        return None
    magic, version = (int(number) for number in np.frombuffer(start, "<i4"))
    if magic == _EVALUATION:
        raise ValueError(
            f"{file}: holds multiple-choice questions for llm.c, expected its token files"
        )
    kind = _MAGIC.get(magic)
    if kind is not None and version != kind.version:
        raise ValueError(
            f"{file}: found version {version} of llm.c's format {magic}, expected {kind.version}"
        )
    return kind


def _map_with_header(file: Path, kind: _Kind) -> np.ndarray:
    with file.open("rb") as opened:
        header = np.frombuffer(opened.read(_HEADER), "<i4")
    dtype, count, size = np.dtype(kind.dtype).newbyteorder("<"), -1, file.stat().st_size
    if len(header) == _HEADER // 4:
        count = int(header[2])
        if count > 0 and size == _HEADER + count * dtype.itemsize:
            return np.asarray(np.memmap(file, dtype, mode="r", offset=_HEADER, shape=(count,)))
    said = f"of {count} {kind.dtype} after a header of {_HEADER} bytes"
    expected = f"{_HEADER + count * dtype.itemsize}, {said}" if count > 0 else "a header and ids"
    raise ValueError(
        f"{file}: found {size} bytes, expected {expected}: truncated, or no token file"
    )


def _map_bare(file: Path, name: str) -> np.ndarray:
    dtype, size = np.dtype(name).newbyteorder("<"), file.stat().st_size
    with file.open("rb") as opened:
        start_bytes = opened.read(8)
    for magic, kind in _OTHERS.items():
        if start_bytes.startswith(magic):
            raise ValueError(
                f"{file}: found {kind}, expected bare ids, as `array.tofile` writes them"
            )
    if not size or size % dtype.itemsize:
        raise ValueError(
            f"{file}: found {size} bytes, expected a multiple of {dtype.itemsize} for {name}: truncated, "
            "or of another --tokens.dtype"
        )
    ids = np.asarray(np.memmap(file, dtype, mode="r"))
    start = ids[: 1 << 20]
    if len(start) >= 16 and not start[1::2].any() and start[::2].any():
        raise ValueError(
            f"{file}: every other {name} is 0, so the ids are wider: name their dtype with --tokens.dtype"
        )
    return ids
