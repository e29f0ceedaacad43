"""The token directories of --data, and whether their tokenizers agree."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama_jax.text.tokenizer import load_tokenizer, special_tokens
from llama_jax.text.tokenizer_files import read_files
from train.data.special_ids import special_ids
from train.data.stdlib import stdlib_tokens
from train.data.token_shards import Index, Source, read_index
from train.options import STDLIB, split_weight

_SHOWN = 12  # characters of a digest in a message


def find_sources(data: Sequence[str]) -> list[Source]:
    """Token directories and their weights, from PATH or PATH=WEIGHT; `stdlib` is tokenized if need be.

    Raises:
        ValueError: no data, or a weight that is not a positive number.
    """
    if not data:
        raise ValueError("data: give at least one token directory")
    sources = []
    for text in data:
        path, weight = split_weight(text)
        directory = stdlib_tokens() if path == STDLIB else Path(path)
        sources.append(Source(directory, weight))
    return sources


def common_index(sources: Sequence[Source]) -> Index:
    """The index of the first source; the tokenizers of all must be the same.

    Raises:
        ValueError: sources with different tokenizers, or a directory without token files.
    """
    (first, _), *others = sources
    index = read_index(first)
    for directory, _ in others:
        read_index(directory)
        require_same_tokenizer(first, directory)
    if index.version == 1 and index.bos_id is None:
        # version 1 does not record it
        ids = special_ids(load_tokenizer(first), first)
        index = replace(index, bos_id=ids.bos_id)
    return index


def require_same_tokenizer(model: Path, tokens: Path) -> None:
    """Raise ValueError unless the tokenizers of the model and of the tokens are the same.

    What they do is compared, not their files: vocabulary, merges, normalizer, pre-tokenizer, added tokens
    and post-processor.
    """
    expected, actual = tokenizer_digest(model), tokenizer_digest(tokens)
    if actual != expected:
        raise ValueError(
            f"{tokens}: found a tokenizer with digest {actual[:_SHOWN]}, expected "
            f"{expected[:_SHOWN]}, that of {model}: tokenize the text with it, "
            f"`python -m train tokenize TEXT --tokenizer {model} --out TOKENS`"
        )


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of everything that decides which ids a directory's tokenizer gives a text.

    It depends on the installed version of `tokenizers`, so compare only digests of one installation.
    """
    fields = json.loads(load_tokenizer(directory).to_str())
    # truncation, padding and decoding do not change the ids of a text
    for name in ("version", "truncation", "padding", "decoder"):
        fields.pop(name, None)
    # nor does the padding token
    pad = special_tokens(read_files(directory)).get("pad_token")
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["content"] != pad]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
