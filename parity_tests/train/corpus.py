"""A word-level tokenizer, token directories written by hand, and helpers to compare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from train.data.token_shards import (
    Index,
    Shard,
    token_dtype,
    write_index,
    write_shard,
)
from train.data.tokens import Split, Tokens, document_ends, read_tokens

EOS = "<|endoftext|>"
WORDS = ["<s>", EOS, "<unk>", *"abcdefgh"]


def word_tokenizer(
    directory: Path, words: Sequence[str] = WORDS, *, bos: bool = False, **config: object
) -> Path:
    """A tokenizer.json that splits at spaces; `config` is its tokenizer_config.json, if any."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in words if word.startswith("<")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def token_directory(
    directory: Path,
    train: Sequence[Sequence[Sequence[int]]],
    validation: Sequence[Sequence[Sequence[int]]] = (),
    *,
    vocab_size: int = 100,
    complete: bool = True,
) -> Path:
    """Shards of documents of ids, as `tokenize` would leave them."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)

    def write(split: Split, shards: Sequence[Sequence[Sequence[int]]]) -> list[Shard]:
        return [
            write_shard(directory, split, number, [np.asarray(ids, dtype) for ids in documents])
            for number, documents in enumerate(shards)
        ]

    splits: dict[Split, list[Shard]] = {
        "train": write("train", train),
        "validation": write("validation", validation),
    }
    index = Index(
        complete=complete,
        dtype=dtype,
        vocab_size=vocab_size,
        eos_id=0,
        bos_id=None,
        tokenizer=["tokenizer.json"],
        made_from={},
        splits=splits,
    )
    write_index(directory, index)
    return directory


def as_version_1(directory: Path) -> Path:
    """Give a directory of tokens the index that the first version wrote."""
    path = directory / "index.json"
    fields = json.loads(path.read_text()) | {"version": 1}
    if fields["eos_id"] is not None:
        fields["bos_id"] = None
    for shards in fields["splits"].values():
        for shard in shards:
            del shard["sha256"]
    path.write_text(json.dumps(fields))
    return directory


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(tokens: Tokens) -> list[list[int]]:
    row = read_tokens(tokens, 0, len(tokens), 1 << 31)
    return [part.tolist() for part in np.split(row, document_ends(tokens, 0, len(tokens))[:-1])]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 30))) for _ in range(count)]
