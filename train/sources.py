"""Where a run's tokens come from: `--data` as the user gives it, and the model's vocabulary with it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, read_json_object
from llama_jax.presets import PRESETS, SMALL
from llama_jax.tokenizer import load_tokenizer
from train.config import STDLIB, ModelOptions
from train.stdlib_data import stdlib_tokens
from train.token_shards import Index, read_index

# the folder of a run that has its tokenizer's files
TOKENIZER = "tokenizer"


def find_sources(data: Sequence[str]) -> list[tuple[Path, float]]:
    """Token directories and their weights, from PATH or PATH=WEIGHT; `stdlib` is made where it is not.

    Raises:
        ValueError: no data, or a weight that is no positive number.
    """
    if not data:
        raise ValueError("data: found none, expected at least one")
    sources = []
    for text in data:
        path, sign, weight_text = text.rpartition("=")
        if not sign:
            path, weight_text = text, "1"
        try:
            weight = float(weight_text)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"data: found weight {weight_text!r}, expected a positive number")
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
    return index


def require_same_tokenizer(model: Path, tokens: Path) -> None:
    """Raise ValueError unless the model's tokenizer.json and that of the tokens have one vocabulary."""
    if load_tokenizer(model).get_vocab() != load_tokenizer(tokens).get_vocab():
        raise ValueError(
            f"{tokens}: found another tokenizer, expected that of {model}: tokenize text with it, "
            f"`python -m train tokenize TEXT --tokenizer {model} --out TOKENS`"
        )


def model_config(options: ModelOptions, index: Index | None, sequence_length: int) -> LlamaConfig:
    """The model's configuration: of the weights to start from, a file, or a preset.

    A small preset takes the vocabulary and the end-of-text token of the data, where there are any.

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
            own |= {"bos_token_id": index.bos_id, "eos_token_id": index.eos_id}
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
    if sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence-length: found {sequence_length}, expected at most "
            f"max_position_embeddings={config.max_position_embeddings} of {name}"
        )
    return config
