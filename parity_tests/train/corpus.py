"""A tokenizer of words, and directories of tokens written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from train.data.token_shards import Index, Shard, Split, token_dtype, write_index, write_shard

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
