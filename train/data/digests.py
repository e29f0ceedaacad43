"""Digests of the inputs of `tokenize`, by which it recognizes a directory that it can complete."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_jax.files.json_object import read_json_object
from train.data.documents import source_files
from train.data.tokenizer_copy import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

# files besides tokenizer.json or tokenizer.model that can change the ids of a text
_ALSO_DECISIVE = ("added_tokens.json", SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG)

_DIGITS = 16  # of a SHA-256 in the index


def tokenizer_files_digest(tokenizer: Path, *, version: int) -> str:
    """Of the files that decide which ids a text has; in version 1 of tokenizer.json alone."""
    home = tokenizer.parent if tokenizer.is_file() else tokenizer
    others = () if version == 1 else ("tokenizer.model", "vocab.json", "merges.txt")
    names = ("tokenizer.json", *others)
    files = [tokenizer] if tokenizer.is_file() else [home / name for name in names]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(path.read_bytes())
    if version == 1:
        return digest.hexdigest()[:_DIGITS]
    for name in _ALSO_DECISIVE:
        if (home / name).is_file():
            fields = read_json_object(home / name)
            fields.pop("chat_template", None)
            digest.update(f"{name}\0{json.dumps(fields, sort_keys=True)}\0".encode())
    return digest.hexdigest()[:_DIGITS]


def sources_digest(
    sources: Sequence[str | Path], *, version: int, hashed: Callable[[int], object]
) -> str:
    """Of the names and contents of all files in order, wherever they lie; in version 1 of names and sizes.

    Args:
        hashed: called with the number of bytes read since the last call.
    """
    if version == 1:
        return _names_digest(sources)
    digest = hashlib.sha256()
    for file in (file for source in sources for file in source_files(source)):
        digest.update(f"{file.name}\0".encode(errors="surrogateescape"))
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                content.update(block)
                hashed(len(block))
        digest.update(content.digest())
    return digest.hexdigest()[:_DIGITS]


def _names_digest(sources: Sequence[str | Path]) -> str:
    files = [file for source in sources for file in source_files(source)]
    names = "".join(f"{file.name}\0{file.stat().st_size}\0" for file in files)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:_DIGITS]
