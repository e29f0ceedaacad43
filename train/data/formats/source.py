"""Token files of another program as a source of data."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llama_jax.text.tokenizer import load_tokenizer
from train.data.formats.files import by_split
from train.data.formats.registry import FORMATS, find_format
from train.data.special_ids import special_ids
from train.data.tokens import (
    Split,
    Tokens,
    Vocabulary,
    document_ends,
    nearest_end,
    part_of,
    require_ids,
    require_loss,
)
from train.options import TokenOptions

# Of a larger file, the digest is that of blocks that are spread over it.
_DIGESTED_BYTES, _DIGESTED_BLOCKS = 1 << 26, 1 << 10

_SEARCHED = 1 << 24  # tokens, at the start, in which a document should end


@dataclass(frozen=True)
class TokenFiles:
    """Token files of one format, a `Source`.

    tokenizer: the directory of their tokenizer, or None if it is not known.
    """

    path: Path
    weight: float
    format: str
    files: tuple[Path, ...]
    options: TokenOptions
    tokenizer: Path | None
    # what has been opened and read, for evaluations do so again and again
    _opened: dict[Split, Tokens] = field(default_factory=dict, init=False, compare=False)
    _vocabulary: list[Vocabulary] = field(default_factory=list, init=False, compare=False)

    def vocabulary(self) -> Vocabulary:
        """Raises ValueError if the tokenizer is not known, missing or damaged."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self.path}: token files have no tokenizer with them: name theirs with --tokens.tokenizer"
            )
        if not self._vocabulary:
            encoder = load_tokenizer(self.tokenizer)
            home = self.tokenizer.parent if self.tokenizer.is_file() else self.tokenizer
            bos_id, eos_id = special_ids(encoder, home)
            size = 1 + max(encoder.get_vocab().values())
            self._vocabulary.append(Vocabulary(home, size, bos_id, eos_id))
        return self._vocabulary[0]

    def require_validation(self) -> None:
        """Raise ValueError if no file is for validation and no documents are to be held out."""
        if not (by_split(self.files)["validation"] or self.options.validation_fraction):
            raise ValueError(
                f"{self.path}: has no files for validation: hold documents out with "
                "--tokens.validation-fraction, or run with --evaluation.every 0"
            )

    def open(self, split: Split) -> Tokens:
        """Raises ValueError for a split without files, or for files that are damaged."""
        if split not in self._opened:
            self._opened[split] = self._open(split)
        return self._opened[split]

    def _open(self, split: Split) -> Tokens:
        splits = by_split(self.files)
        fraction = 0.0 if splits["validation"] else self.options.validation_fraction
        files = splits["train" if fraction else split]
        if not files:
            if split == "validation":
                self.require_validation()
            raise ValueError(
                f"{self.path}: all of its files are for validation or tests by their names"
            )
        tokens = FORMATS[self.format].open_files(files, self.vocabulary(), self.options)
        if not fraction:
            return tokens
        # not the last token alone, or training would have all the others
        target = min(round(len(tokens) * (1 - fraction)), len(tokens) - 1)
        cut = nearest_end(tokens, target)
        if cut is None:
            raise ValueError(
                f"{self.path}: is a single document, which cannot be divided for validation: run with "
                "--evaluation.every 0 and --tokens.validation-fraction 0"
            )
        return part_of(tokens, *((0, cut) if split == "train" else (cut, len(tokens))))

    def digest(self) -> str:
        """Of what the files hold and what their ids mean; of large files a part is read."""
        options, vocabulary = self.options, self.vocabulary()
        facts: list[object] = [self.format, options.dtype, options.column, options.boundary]
        facts += [*vocabulary[1:], options.validation_fraction]
        for split, files in by_split(self.files).items():
            both = [path for file in files for path in FORMATS[self.format].companions(file)]
            facts.append([split, [_file_digest(path) for path in both]])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def require_intact(self, splits: Sequence[Split], bytes_to_read: int) -> int:
        """Raise ValueError if files are missing or truncated, or hold an id that the tokenizer has not."""
        vocabulary = self.vocabulary()
        for split in splits:
            tokens = self.open(split)
            require_loss(tokens, self.path)
            itemsize = tokens.shards[0][:1].itemsize
            count = min(len(tokens), max(bytes_to_read, 0) // itemsize)
            require_ids(tokens, count, vocabulary.vocab_size)
            bytes_to_read -= count * itemsize
        searched = min(_SEARCHED, len(tokens) - 1)
        if tokens.delimiter is not None and not len(document_ends(tokens, 0, searched)):
            warnings.warn(
                f"{self.path}: its first {searched:,} tokens lack id {tokens.delimiter}, which separates "
                "documents, and are one document; if they should not be, see --tokens.boundary and "
                "--tokens.tokenizer",
                stacklevel=2,
            )
        return bytes_to_read


def token_files(
    path: Path, weight: float, options: TokenOptions, tokenizer: Path | None
) -> TokenFiles | None:
    """The token files at a path; None if there are none of a known format."""
    found = find_format(path)
    if found is None:
        return None
    return TokenFiles(path, weight, found.format, tuple(found.files), options, tokenizer)


def _file_digest(path: Path) -> str:
    size = path.stat().st_size if path.is_file() else -1
    digest = hashlib.sha256(f"{size}\0".encode())
    if size > 0:
        block = size if size <= _DIGESTED_BYTES else _DIGESTED_BYTES // _DIGESTED_BLOCKS
        starts = np.linspace(0, size - block, 1 if block == size else _DIGESTED_BLOCKS)
        with path.open("rb") as file:
            for start in starts.astype(np.int64):
                file.seek(int(start))
                digest.update(file.read(block))
    return digest.hexdigest()
