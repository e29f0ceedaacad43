"""Meta's `tokenizer.model`, beside the files that Hugging Face's tokenizers are read from."""

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
    """What Hugging Face needs beside a `tokenizer.model`, and the ids of bos and eos that it tells.

    Nothing, where `files` have a tokenizer.json or no tokenizer.model. Raises ValueError for a
    tokenizer.model that is damaged, or larger than the model's vocabulary.
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
        raise ValueError(f"{path / MODEL}: {error}; --no-tokenizer leaves it") from None
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if is_tiktoken(content):
        ids = dict(zip(("bos_token", "eos_token"), added.items(), strict=False))
        stops = [added[token] for token in STOPS if token in added]
    else:
        pieces = read_pieces(content)
        places = {"bos_token": pieces.bos, "eos_token": pieces.eos}
        ids = {name: (pieces.tokens[i], i) for name, i in places.items() if i >= 0}
        stops = [pieces.eos] if pieces.eos >= 0 else []
    options: Json = {
        # the class that takes tokenizer.json as it is
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, (token, _) in ids.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    generation = {f"{name}_id": i for name, (_, i) in ids.items()}
    if len(stops) > 1:
        generation |= {"eos_token_id": stops}
    made = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": options,
        "generation_config.json": generation,
    }
    texts = {name: _text(value) for name, value in made.items() if name not in files}
    return texts, {f"{name}_id": i for name, (_, i) in ids.items()}


def metas_file(files: Mapping[str, bytes]) -> bytes | None:
    """The `tokenizer.model` for Meta's code: carried along, or made of a tokenizer.json of Llama 3's form.

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
