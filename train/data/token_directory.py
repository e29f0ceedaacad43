"""A token directory, which `tokenize` wrote, as a source of data."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from llama_jax.text.tokenizer import load_tokenizer
from train.data.special_ids import special_ids
from train.data.token_shards import (
    Index,
    Shard,
    ends_path,
    filling,
    loss_path,
    open_tokens,
    read_index,
)
from train.data.tokens import Split, Tokens, Vocabulary

_SHOWN = 12  # characters of a digest in a message


class TokenDirectory(NamedTuple):
    """A token directory and its weight, a `Source`."""

    path: Path
    weight: float = 1.0

    def vocabulary(self) -> Vocabulary:
        """Raises ValueError without an index, or for one that is damaged."""
        index = read_index(self.path)
        bos_id = index.bos_id
        if index.version == 1 and bos_id is None:
            # version 1 does not record it
            bos_id = special_ids(load_tokenizer(self.path), self.path).bos_id
        return Vocabulary(self.path, index.vocab_size, bos_id, index.eos_id)

    def require_validation(self) -> None:
        """Raise ValueError if the validation split is empty."""
        index = read_index(self.path)
        if index.complete and not index.splits["validation"]:
            remedy = "tokenize with a larger --validation-fraction or more documents"
            if index.fills_validation is not None:
                remedy = filling(index.fills_validation)
            raise ValueError(
                f"{self.path}: the validation split is empty: run with --evaluation.every 0, or {remedy}"
            )

    def open(self, split: Split) -> Tokens:
        """Raises ValueError as `open_tokens`."""
        return open_tokens(self.path, split)

    def digest(self) -> str:
        """See `data_digest`."""
        return data_digest(read_index(self.path))

    def require_intact(self, splits: Sequence[Split], bytes_to_read: int) -> int:
        """Raise ValueError if a shard of the splits is missing, or not what its index says."""
        index = read_index(self.path)
        for split in splits:
            self.open(split)  # checks existence and sizes
        shards = [shard for split in splits for shard in index.splits[split]]
        with ThreadPoolExecutor() as pool:
            within = list(self._within(shards, bytes_to_read))
            digests = pool.map(
                lambda shard: _shard_digest(self.path / shard.file, index.loss_mask), within
            )
            for shard, digest in zip(within, digests, strict=True):
                if digest != shard.sha256:
                    raise ValueError(
                        f"{self.path / shard.file}: found contents with digest {digest[:_SHOWN]}, expected "
                        f"{str(shard.sha256)[:_SHOWN]} by the index: restore the file, or tokenize again"
                    )
        return bytes_to_read - sum(self._size(shard) for shard in shards)

    def missing_tokenizer(self) -> Path | None:
        """A file of the tokenizer that the index lists and that is not there."""
        paths = [self.path / name for name in read_index(self.path).tokenizer]
        return next((path for path in paths if not path.is_file()), None)

    def _within(self, shards: Sequence[Shard], size: int) -> Iterator[Shard]:
        """The shards with a digest that lie within the first bytes."""
        for shard in shards:
            size -= self._size(shard)
            if shard.sha256 is not None and size >= 0:
                yield shard

    def _size(self, shard: Shard) -> int:
        return (self.path / shard.file).stat().st_size


def data_digest(index: Index) -> str:
    """SHA-256 of the data: every shard of both splits, and what their numbers mean.

    An index of version 1 has no digests of its shards; their sizes, and what they were made from, identify
    it.
    """
    facts: list[object] = [index.dtype, index.vocab_size, index.eos_id]
    for split in sorted(index.splits):
        facts.append([split, [[s.tokens, s.documents, s.sha256] for s in index.splits[split]]])
    if index.version == 1:
        facts.append(index.made_from)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _shard_digest(file: Path, loss_mask: bool) -> str:
    digest = hashlib.sha256()
    for path in (file, ends_path(file), *([loss_path(file)] if loss_mask else [])):
        with path.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
