"""The sources of --data, and whether their tokenizers agree."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from llama_jax.text.tokenizer import load_tokenizer, special_tokens
from llama_jax.text.tokenizer_files import read_files
from train.data.formats.source import token_files
from train.data.stdlib import stdlib_tokens
from train.data.token_directory import TokenDirectory
from train.data.token_shards import INDEX_FILE
from train.data.tokens import Source, Vocabulary
from train.options import STDLIB, TokenOptions, split_weight

_SHOWN = 12  # characters of a digest in a message


def find_sources(
    data: Sequence[str], options: TokenOptions | None = None, tokenizer: Path | None = None
) -> list[Source]:
    """The sources and their weights, from PATH or PATH=WEIGHT; `stdlib` is tokenized if need be.

    Args:
        options: of token files that other programs wrote.
        tokenizer: the directory of their tokenizer.

    Raises:
        ValueError: no data, or a weight that is not a positive number.
    """
    if not data:
        raise ValueError("data: give at least one token directory")
    sources: list[Source] = []
    for text in data:
        path, weight = split_weight(text)
        directory = stdlib_tokens() if path == STDLIB else Path(path)
        files = None
        if not (directory / INDEX_FILE).exists():
            files = token_files(directory, weight, options or TokenOptions(), tokenizer)
        sources.append(TokenDirectory(directory, weight) if files is None else files)
    return sources


def common_vocabulary(sources: Sequence[Source]) -> Vocabulary:
    """The vocabulary of the first source; the tokenizers of all must be the same.

    Raises:
        ValueError: sources with different tokenizers, or a directory without token files.
    """
    first, *others = [source.vocabulary() for source in sources]
    for other in others:
        if other.tokenizer != first.tokenizer:
            require_same_tokenizer(first.tokenizer, other.tokenizer)
    return first


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
