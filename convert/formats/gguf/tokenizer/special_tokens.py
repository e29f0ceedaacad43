"""What goes beside a vocabulary in GGUF: special ids and chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.formats.gguf.tokenizer.ends import ends_by_text
from llama_jax.config import LlamaConfig
from llama_jax.generation.config import token_ids
from llama_jax.text.chat_template import chat_templates
from llama_jax.text.tokenizer import special_tokens
from llama_jax.text.tokenizer_files import json_file


def special_id_metadata(
    files: Mapping[str, bytes], config: LlamaConfig, ids: Mapping[str, int]
) -> dict[str, int]:
    """The ids of bos, eos, unknown and padding, and of further end tokens.

    As llama.cpp's converter: the token that the tokenizer's files name, else the config's id. A model with
    several end tokens (Llama 3: <|end_of_text|>, <|eom_id|>, <|eot_id|>) has them as eos, eot and eom; of
    more than three, those have keys that llama.cpp would not know by their text.

    Args:
        ids: of the tokens; empty without a vocabulary.
    """
    named = special_tokens(files)

    def is_token(value: Any) -> bool:
        return type(value) is int and 0 <= value < config.vocab_size

    def token_id(name: str, default: Any) -> Any:
        return ids.get(named.get(f"{name}_token", ""), default)

    eos = token_id("eos", next(iter(config.eos_token_ids), None))
    further_ends = [i for i in end_tokens(files, config) if is_token(i) and i != eos]
    if len(further_ends) > 2:
        by_text = ends_by_text(list(ids))
        further_ends = sorted(further_ends, key=lambda i: i in by_text)[:2]
    texts = {i: token for token, i in ids.items()}
    further_ends.sort(key=lambda i: "eom" in texts.get(i, ""))
    eot, eom, *_ = [*further_ends, None, None]
    special_ids = {
        "bos": token_id("bos", config.bos_token_id),
        "eos": eos,
        "eot": eot,
        "eom": eom,
        "unknown": token_id("unk", None),
        "padding": token_id("pad", config.pad_token_id),
    }
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in special_ids.items() if is_token(i)}


def template_metadata(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The chat templates: the default one, and others by name."""
    templates = chat_templates(files)
    metadata: dict[str, Any] = {}
    for name, template in templates.items():
        if template:
            suffix = "" if name == "default" else f".{name}"
            metadata[f"tokenizer.chat_template{suffix}"] = template
    if other_names := [name for name in templates if name != "default"]:
        metadata["tokenizer.chat_templates"] = other_names
    return metadata


def end_tokens(files: Mapping[str, bytes], config: LlamaConfig) -> list[int]:
    """Every token at which transformers ends: those of the config and of generation_config.json."""
    stops = token_ids(json_file(files, "generation_config.json").get("eos_token_id"))
    stops = stops if isinstance(stops, list) else [stops]
    return list(dict.fromkeys(i for i in (*config.eos_token_ids, *stops) if type(i) is int))
