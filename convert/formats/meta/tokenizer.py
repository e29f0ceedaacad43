"""Meta's `tokenizer.model`, and the files that Hugging Face's tokenizers are read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.text.sentencepiece import read_pieces
from llama_jax.text.tiktoken import STOPS, is_tiktoken, tiktoken_model
from llama_jax.text.tokenizer import model_json, read_tokenizer
from llama_jax.text.tokenizer_json import Json

MODEL = "tokenizer.model"


def hugging_face_files(
    path: Path, files: Mapping[str, bytes], config: LlamaConfig
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What Hugging Face needs beside a `tokenizer.model`, and the config's fields of bos and eos.

    Nothing where `files` have a tokenizer.json or no tokenizer.model.

    Raises:
        ValueError: a tokenizer.model that is damaged, or larger than the model's vocabulary.
    """
    if MODEL not in files or "tokenizer.json" in files:
        return {}, {}
    content = files[MODEL]
    try:
        release_3_0 = config.rope["rope_type"] == "default"
        tokenizer = model_json(content, release_3_0=release_3_0)
        if (count := _count(tokenizer)) > config.vocab_size:
            raise ValueError(f"{count} tokens, expected at most vocab_size {config.vocab_size}")
    except ValueError as error:
        raise ValueError(f"{path / MODEL}: {error}; use --no-tokenizer to leave it out") from None
    named, stops = _special_tokens(content, tokenizer)
    ids: dict[str, Any] = {f"{name}_id": token_id for name, (_, token_id) in named.items()}
    settings: Json = {
        # the class that takes tokenizer.json as it is
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, (token, _) in named.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    made: dict[str, Json] = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "generation_config.json": ids | ({"eos_token_id": stops} if len(stops) > 1 else {}),
    }
    return {name: _text(value) for name, value in made.items() if name not in files}, ids


def _special_tokens(
    content: bytes, tokenizer: Json
) -> tuple[dict[str, tuple[str, int]], list[int]]:
    """bos_token and eos_token, each as text and id; and the ids at which a generation ends."""
    if is_tiktoken(content):
        added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        # the first two are <|begin_of_text|> and <|end_of_text|>
        named = dict(zip(("bos_token", "eos_token"), added.items(), strict=False))
        return named, [added[token] for token in STOPS if token in added]
    pieces = read_pieces(content)
    ids = {"bos_token": pieces.bos, "eos_token": pieces.eos}
    named = {name: (pieces.tokens[i], i) for name, i in ids.items() if i >= 0}
    return named, [pieces.eos] if pieces.eos >= 0 else []


def meta_tokenizer(files: Mapping[str, bytes]) -> bytes | None:
    """The `tokenizer.model` for Meta's code: that of `files`, or made of a tokenizer.json like Llama 3's.

    None where there is no tokenizer, or one that Meta's format cannot hold.
    """
    if MODEL in files or "tokenizer.json" not in files:
        return files.get(MODEL)
    return tiktoken_model(json.loads(read_tokenizer(files).to_str()))


def _count(tokenizer: Json) -> int:
    added = [token["id"] for token in tokenizer["added_tokens"]]
    return 1 + max([*tokenizer["model"]["vocab"].values(), *added])


def _text(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
