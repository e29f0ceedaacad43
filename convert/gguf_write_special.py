"""What stands beside a vocabulary in GGUF: special ids, chat templates, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.chat_template import chat_templates
from llama_jax.config import LlamaConfig
from llama_jax.tokenizer import special_tokens
from llama_jax.tokenizer_files import json_file

Json = dict[str, Any]


def refusal(message: str) -> ValueError:
    """The error for a tokenizer that GGUF cannot express."""
    return ValueError(
        f"the tokenizer cannot be written as GGUF: {message}; --no-tokenizer leaves it out"
    )


def special_ids(
    files: Mapping[str, bytes], config: LlamaConfig, ids: Mapping[str, int]
) -> dict[str, int]:
    """The ids of bos, eos, unknown and padding, and the further ends of a generation.

    As llama.cpp's converter: the token that the tokenizer's files name, else the config's id. A model with
    several ends (Llama 3: <|end_of_text|>, <|eom_id|>, <|eot_id|>) has them as eos, eot and eom.

    Args:
        ids: of the tokens; empty without a vocabulary.
    """
    named = special_tokens(files)
    generation = json_file(files, "generation_config.json")

    def known(value: Any) -> bool:
        return type(value) is int and 0 <= value < config.vocab_size

    def token_id(name: str, otherwise: Any) -> Any:
        return ids.get(named.get(f"{name}_token", ""), otherwise)

    stops = generation.get("eos_token_id")
    ends = [*config.eos_token_ids, *(stops if isinstance(stops, list) else [stops])]
    eos = token_id("eos", next(iter(config.eos_token_ids), None))
    others = [i for i in dict.fromkeys(ends) if known(i) and i != eos]
    names = {i: token for token, i in ids.items()}
    others.sort(key=lambda i: "eom" in names.get(i, ""))
    found = {
        "bos": token_id("bos", config.bos_token_id),
        "eos": eos,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unknown": token_id("unk", None),
        "padding": token_id("pad", config.pad_token_id),
    }
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in found.items() if known(i)}


def template_metadata(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The chat templates: the default one, and others by name."""
    templates = chat_templates(files)
    metadata: dict[str, Any] = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): template
        for name, template in templates.items()
        if template
    }
    others = [name for name in templates if name != "default"]
    return metadata | ({"tokenizer.chat_templates": others} if others else {})


def sampling(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The sampling that generation_config.json recommends; nothing where it recommends none."""
    generation = json_file(files, "generation_config.json")
    if not generation.get("do_sample"):
        return {}
    found: Json = {
        "temp": float(generation.get("temperature", 1.0)),
        "top_k": np.int32(generation.get("top_k", 0)),
        "top_p": float(generation.get("top_p", 0.0)),
        "min_p": float(generation.get("min_p") or 0.0),
        "penalty_repeat": float(generation.get("repetition_penalty", 0.0)),
    }
    return {f"general.sampling.{key}": value for key, value in found.items() if value > 0}
