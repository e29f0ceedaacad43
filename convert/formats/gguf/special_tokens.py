"""What stands beside a vocabulary in GGUF: special ids, chat templates, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.formats.gguf.ends import ends_by_text
from llama_jax.config import LlamaConfig
from llama_jax.generation.config import GenerationConfig, token_ids
from llama_jax.text.chat_template import chat_templates
from llama_jax.text.tokenizer import special_tokens
from llama_jax.text.tokenizer_files import json_file

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
    several ends (Llama 3: <|end_of_text|>, <|eom_id|>, <|eot_id|>) has them as eos, eot and eom; of more
    than three, those have keys that llama.cpp would not know by their text.

    Args:
        ids: of the tokens; empty without a vocabulary.
    """
    named = special_tokens(files)

    def known(value: Any) -> bool:
        return type(value) is int and 0 <= value < config.vocab_size

    def token_id(name: str, otherwise: Any) -> Any:
        return ids.get(named.get(f"{name}_token", ""), otherwise)

    eos = token_id("eos", next(iter(config.eos_token_ids), None))
    others = [i for i in ends_of(files, config) if known(i) and i != eos]
    names = {i: token for token, i in ids.items()}
    if len(others) > 2:
        by_text = ends_by_text(list(ids))
        others = sorted(others, key=lambda i: i in by_text)[:2]
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


def ends_of(files: Mapping[str, bytes], config: LlamaConfig) -> list[int]:
    """Every token at which transformers ends: those of the config and of generation_config.json."""
    stops = token_ids(json_file(files, "generation_config.json").get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [stops]
    return list(dict.fromkeys(i for i in (*config.eos_token_ids, *stops) if type(i) is int))


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def sampling(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The sampling that generation_config.json recommends; nothing where it recommends none."""
    fields = json_file(files, "generation_config.json")
    generation = GenerationConfig(fields=fields)
    if not generation.do_sample:
        return {}
    found: Json = {}
    for key, name in _SAMPLING.items():
        value = generation.default(name, 1.0 if key == "temp" else None)
        if value is None or not _usable(name, value):
            continue
        found[key] = np.int32(value) if key == "top_k" else float(value)
    return {f"general.sampling.{key}": value for key, value in found.items()}


def unusable_sampling(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Fields of generation_config.json that transformers would refuse to draw with."""
    generation = GenerationConfig(fields=json_file(files, "generation_config.json"))
    if not generation.do_sample:
        return {}
    found = {name: generation.default(name, None) for name in _SAMPLING.values()}
    return {
        name: value
        for name, value in found.items()
        if value is not None and not _usable(name, value)
    }


def _usable(name: str, value: Any) -> bool:
    """Whether transformers draws with it."""
    if name == "top_k":
        return type(value) is int and 0 <= value < 2**31
    if type(value) not in (int, float) or not abs(value) < 1e30:
        return False
    return value >= 0 if name == "min_p" else value > 0
