"""Token files: a directory of memory-mapped shards, and the index that describes them.

    index.json             `Index`: what the directory holds; rewritten after each shard
    tokenizer.json, ...    the tokenizer and the files that belong to it
    train-00000.tokens     token ids, little-endian uint16 (vocabulary up to 65536) or uint32
    train-00000.ends       little-endian int64: where each document ends, counted in tokens of the shard
    train-00000.loss       of chats: uint8, 1 for each token that is in the loss, 0 for the others
    validation-00000.tokens, ...

A shard holds one or more complete documents, each of at least one token. The index has the SHA-256 of every
shard, so that other data with the same names and sizes is noticed; version 1, which can still be read, had
not.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.files.staging import replacing, write_text
from train.data.tokens import SPLITS, Split, Tokens, join_shards, listed_ends

INDEX_FILE = "index.json"
VERSION = 2

_ENDS_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class Shard:
    """One shard: the name of its .tokens file (with .ends beside it), and how much it holds.

    sha256: of the .tokens and then the .ends file; None in an index of version 1.
    """

    file: str
    tokens: int
    documents: int
    sha256: str | None = None


@dataclass(frozen=True)
class Index:
    """The contents of index.json.

    complete: False while shards are still to come.
    dtype: of the token files, "uint16" or "uint32", little-endian.
    vocab_size: the tokenizer's largest id plus one.
    eos_id: the id that ends each document; None if the tokenizer has none, and then each document begins
        with `bos_id`.
    bos_id: the tokenizer's beginning-of-text token, or None. (Version 1 has it only without `eos_id`.)
    tokenizer: names of the tokenizer's files in the directory, tokenizer.json first.
    made_from: the arguments of `tokenize`, which must be the same to continue an incomplete directory.
    splits: the shards of "train" and "validation", in order.
    loss_mask: whether each shard has a .loss file.
    fills_validation: if the validation split is empty, the fraction that would have given it a document.
    """

    complete: bool
    dtype: str
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    tokenizer: list[str]
    made_from: dict[str, Any]
    splits: dict[Split, list[Shard]]
    version: int = VERSION
    loss_mask: bool = False
    fills_validation: float | None = None


def filling(fraction: float | None) -> str:
    """What to do about a split that is empty.

    Args:
        fraction: with which `tokenize` would fill it; None if it cannot.
    """
    if fraction is None:
        return "a single document cannot be divided: tokenize more of them"
    return f"tokenize with --validation-fraction {fraction!r} to fill it"


def token_dtype(vocab_size: int) -> str:
    """The name of the smallest dtype that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(
    directory: Path,
    split: Split,
    number: int,
    documents: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None = None,
) -> Shard:
    """Write the documents, each [tokens] of the index's dtype, as one shard, atomically.

    Args:
        masks: which tokens are in the loss, each [tokens] bool; None if all are.
    """
    file = f"{split}-{number:05d}.tokens"
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    digest = hashlib.sha256()
    _write(directory / file, np.concatenate(documents), digest)
    _write(ends_path(directory / file), ends, digest)
    if masks is not None:
        _write(loss_path(directory / file), np.concatenate(masks).astype(np.uint8), digest)
    return Shard(file, int(ends[-1]), len(documents), digest.hexdigest())


def write_index(directory: Path, index: Index) -> None:
    """Write or replace index.json atomically."""
    fields = dataclasses.asdict(index)
    for name in ("loss_mask", "fills_validation"):  # earlier versions do not know them
        if not fields[name]:
            del fields[name]
    text = json.dumps(fields, indent=2)
    with replacing(directory / INDEX_FILE) as staged:
        write_text(staged, text + "\n")


def read_index(directory: Path) -> Index:
    """The index of a directory, complete or not.

    Raises:
        ValueError: there is none, or it is not valid or of another version.
    """
    path = directory / INDEX_FILE
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        remedy = "make a token directory with `python -m train tokenize`"
        if directory.exists():
            raise ValueError(
                f"{directory}: found neither {INDEX_FILE} of a token directory nor token files (.bin, "
                f".arrow, .array_record): {remedy}"
            ) from None
        raise ValueError(f"{directory}: no such file or directory; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if version not in range(1, VERSION + 1):
        raise ValueError(f"{path}: found version {version!r}, expected {VERSION}")
    try:
        splits = {split: [Shard(**shard) for shard in fields["splits"][split]] for split in SPLITS}
        index = Index(**{**fields, "splits": splits})
        right_dtype = index.dtype == token_dtype(index.vocab_size)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: wrong or missing fields ({error})") from None
    if not right_dtype:
        raise ValueError(
            f"{path}: found dtype {index.dtype!r}, expected {token_dtype(index.vocab_size)!r} for a "
            f"vocabulary of {index.vocab_size}"
        )
    _require_types(path, index)
    return index


def _require_types(path: Path, index: Index) -> None:
    """Raise ValueError for a value of the wrong type, or a file outside the directory."""

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and value == os.path.basename(value) != ""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**63

    shards = [shard for split in SPLITS for shard in index.splits[split]]
    valid = {
        "complete": isinstance(index.complete, bool),
        "vocab_size": is_count(index.vocab_size),
        "eos_id": index.eos_id is None or type(index.eos_id) is int,
        "bos_id": index.bos_id is None or type(index.bos_id) is int,
        "tokenizer": isinstance(index.tokenizer, list) and all(map(is_name, index.tokenizer)),
        "made_from": isinstance(index.made_from, dict),
        "loss_mask": isinstance(index.loss_mask, bool),
        "fills_validation": isinstance(index.fills_validation, float | None),
        "splits": all(
            is_name(shard.file) and is_count(shard.tokens) and is_count(shard.documents)
            for shard in shards
        ),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            shown = repr(getattr(index, name))[:80]
            raise ValueError(f"{path}: {name}: {shown} is not what `tokenize` writes")


def open_tokens(directory: Path, split: Split) -> Tokens:
    """Memory-map one split.

    Raises:
        ValueError: no index or an incomplete one, an empty split, a file that is missing, truncated or too
            long, or ends that do not fit.
    """
    index = read_index(directory)
    if not index.complete:
        raise ValueError(
            f"{directory}: incomplete; run the same `python -m train tokenize` again to complete it"
        )
    shards = index.splits[split]
    if not shards and index.fills_validation is not None:
        raise ValueError(
            f"{directory}: the validation split is empty: {filling(index.fills_validation)}"
        )
    if not shards:
        larger = "larger" if split == "validation" else "smaller"
        raise ValueError(
            f"{directory}: the {split} split is empty: tokenize with a {larger} --validation-fraction or "
            "more documents"
        )
    dtype = np.dtype(index.dtype).newbyteorder("<")
    files = tuple(directory / shard.file for shard in shards)
    tokens, ends = [], []
    for path, shard in zip(files, shards, strict=True):
        tokens.append(_map(path, dtype, shard.tokens))
        ends.append(_map(ends_path(path), _ENDS_DTYPE, shard.documents))
        if ends[-1][-1] != shard.tokens:
            raise ValueError(
                f"{ends_path(path)}: found {ends[-1][-1]} as the last end, expected {shard.tokens}"
            )
    joined = join_shards(files, tokens, [listed_ends(shard) for shard in ends])
    if not index.loss_mask:
        return joined
    masks = [
        _map(loss_path(path), np.dtype(np.uint8), shard.tokens)
        for path, shard in zip(files, shards, strict=True)
    ]
    return dataclasses.replace(joined, in_loss=tuple(masks))


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    expected = count * dtype.itemsize
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the index lists it")
    if (size := path.stat().st_size) != expected:
        raise ValueError(
            f"{path}: found {size} bytes, expected {expected} for the {count} {dtype.name} in the index"
        )
    # a plain view, since slicing memmap objects is slow
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,)))


def _write(path: Path, values: np.ndarray, digest: Any) -> None:
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    digest.update(little)
    with replacing(path) as staged, staged.open("wb") as file:
        # not `tofile`, whose errors give no reason
        file.write(little.data)
        file.flush()
        os.fsync(file.fileno())


def loss_path(path: Path) -> Path:
    """The .loss file beside a .tokens file."""
    return path.with_suffix(".loss")


def ends_path(path: Path) -> Path:
    """The .ends file beside a .tokens file."""
    return path.with_suffix(".ends")
