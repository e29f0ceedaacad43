"""Where a run's tokens come from: `--data` as the user gives it, and the model's vocabulary with it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.files.json_object import read_json_object
from llama_jax.presets import PRESETS, SMALL
from llama_jax.text.tokenizer import load_tokenizer, special_tokens
from llama_jax.text.tokenizer_files import read_files
from train.data.special_ids import SpecialIds, model_ids, special_ids
from train.data.stdlib import stdlib_tokens
from train.data.token_shards import Index, read_index
from train.options import STDLIB, ModelOptions, split_weight

_SHOWN = 12  # characters of a digest in a message


def find_sources(data: Sequence[str]) -> list[tuple[Path, float]]:
    """Token directories and their weights, from PATH or PATH=WEIGHT; `stdlib` is made where it is not.

    Raises:
        ValueError: no data, or a weight that is not a positive number.
    """
    if not data:
        raise ValueError("data: found none, expected at least one")
    sources = []
    for text in data:
        path, weight = split_weight(text)
        sources.append((stdlib_tokens() if path == STDLIB else Path(path), weight))
    return sources


def common_index(sources: Sequence[tuple[Path, float]]) -> Index:
    """The index of the first source, whose tokenizer all must share.

    Raises:
        ValueError: two sources of different tokenizers, or a directory that is none of tokens.
    """
    (first, _), *others = sources
    index = read_index(first)
    for directory, _ in others:
        read_index(directory)
        require_same_tokenizer(first, directory)
    if index.version == 1 and index.bos_id is None:
        # which version 1 does not say
        found = special_ids(load_tokenizer(first), first)
        index = replace(index, bos_id=found.bos_id)
    return index


def require_same_tokenizer(model: Path, tokens: Path) -> None:
    """Raise ValueError unless the tokenizers of the model and of the tokens are the same.

    Not their files are compared but what they do: vocabulary, merges, normalizer, pre-tokenizer, added
    tokens and what goes around a text.
    """
    expected, found = tokenizer_digest(model), tokenizer_digest(tokens)
    if found != expected:
        raise ValueError(
            f"{tokens}: found a tokenizer with digest {found[:_SHOWN]}, expected "
            f"{expected[:_SHOWN]}, that of {model}: tokenize the text with it, "
            f"`python -m train tokenize TEXT --tokenizer {model} --out TOKENS`"
        )


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of what a directory's tokenizer makes of a text.

    Its JSON is that of the installed `tokenizers`, so it is only compared with one made by the same.
    """
    fields = json.loads(load_tokenizer(directory).to_str())
    # how text is cut, filled up and put together again says nothing about which ids it has
    for name in ("version", "truncation", "padding", "decoder"):
        fields.pop(name, None)
    # nor does the token that fills up, which a file may name in its padding alone
    pad = special_tokens(read_files(directory)).get("pad_token")
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["content"] != pad]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def model_config(options: ModelOptions, index: Index | None, sequence_length: int) -> LlamaConfig:
    """The model's configuration: of the weights to start from, a file, or a preset.

    Weights to start from keep their special tokens; any other model begins and ends its texts as the data
    does. A small preset also takes the vocabulary of the data.

    Raises:
        ValueError: an unknown preset; a vocabulary smaller than the data's; sequences longer than the
            model's positions.
    """
    if options.init_from is not None:
        name, config = str(options.init_from), LlamaConfig.from_pretrained(options.init_from)
    elif options.config is not None:
        name, path = str(options.config), options.config
        if path.is_file():
            config = LlamaConfig.from_dict(read_json_object(path))
        else:
            config = LlamaConfig.from_pretrained(path)
    elif options.preset in SMALL:
        name, small = options.preset, SMALL[options.preset].to_dict()
        longest = max(small["max_position_embeddings"], sequence_length)
        own: dict[str, Any] = {"max_position_embeddings": longest}
        if index is not None:
            own["vocab_size"] = index.vocab_size
        config = LlamaConfig.from_dict(small | own)
    elif options.preset in PRESETS:
        name, config = options.preset, PRESETS[options.preset]
    else:
        raise ValueError(
            f"model.preset: found {options.preset!r}, expected one of {', '.join(PRESETS)}"
        )
    if index is not None and index.vocab_size > config.vocab_size:
        raise ValueError(
            f"{name}: found vocab_size {config.vocab_size}, expected at least {index.vocab_size}, "
            "the data's"
        )
    if index is not None and options.init_from is None:
        config = _with_ids_of(config, index)
    if sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence-length: found {sequence_length}, expected at most "
            f"max_position_embeddings={config.max_position_embeddings} of {name}"
        )
    return config


def _with_ids_of(config: LlamaConfig, index: Index) -> LlamaConfig:
    """The config with the special tokens of the data; of several that end a text none is lost."""
    ids: dict[str, Any] = model_ids(SpecialIds(index.bos_id, index.eos_id))
    if ids["eos_token_id"] in config.eos_token_ids:
        del ids["eos_token_id"]
    return LlamaConfig.from_dict(config.to_dict() | ids)
