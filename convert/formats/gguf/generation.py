"""`generation_config.json` from GGUF metadata, and the sampling metadata of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.formats.gguf.tokenizer.ends import end_ids
from llama_jax.generation.config import GenerationConfig
from llama_jax.text.tokenizer_files import json_file

_SAMPLING = {  # `general.sampling.*` -> generation_config.json
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def generation_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`generation_config.json`: where to stop, and the sampling the file recommends, if it does.

    A chat model ends its turn with another token than its text (Llama 3: <|eot_id|>, <|eom_id|>), so
    the eos here is a list where llama.cpp would end at several.
    """
    end_tokens = dict.fromkeys(
        token
        for token in (config["eos_token_id"], *end_ids(metadata))
        if isinstance(token, int) and 0 <= token < config["vocab_size"]
    )
    result: dict[str, Any] = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": list(end_tokens) if len(end_tokens) > 1 else next(iter(end_tokens), None),
        "pad_token_id": config["pad_token_id"],
    }
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        off = name in ("top_k", "min_p") and value == 0
        if isinstance(value, np.float32) and np.isfinite(value) and (value > 0 or off):
            result[name] = float(str(value))
        elif type(value) is int and (value > 0 or off):
            result[name] = value
    result["do_sample"] = "temperature" in result
    return {name: value for name, value in result.items() if value is not None}


def sampling_metadata(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The sampling that generation_config.json recommends; {} where it recommends none."""
    generation = _generation(files)
    if not generation.do_sample:
        return {}
    metadata: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = generation.default(name, 1.0 if name == "temperature" else None)
        if value is not None and _is_usable(name, value):
            typed = np.int32(value) if name == "top_k" else float(value)
            metadata[f"general.sampling.{key}"] = typed
    return metadata


def unusable_sampling(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Sampling fields of generation_config.json that transformers would reject."""
    generation = _generation(files)
    if not generation.do_sample:
        return {}
    values = {name: generation.default(name, None) for name in _SAMPLING.values()}
    return {
        name: value
        for name, value in values.items()
        if value is not None and not _is_usable(name, value)
    }


def _generation(files: Mapping[str, bytes]) -> GenerationConfig:
    return GenerationConfig(fields=json_file(files, "generation_config.json"))


def _is_usable(name: str, value: Any) -> bool:
    """Whether transformers samples with it."""
    if name == "top_k":
        return type(value) is int and 0 <= value < 2**31
    if type(value) not in (int, float) or not abs(value) < 1e30:
        return False
    return value >= 0 if name == "min_p" else value > 0
