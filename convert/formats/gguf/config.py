"""A Llama's config as GGUF metadata: the keys that llama.cpp's `llama` architecture reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import size_label
from gguf.constants import GGML_QUANT_VERSION

from convert.checkpoint import Checkpoint
from llama_jax.config import LlamaConfig

_GENERAL = {"license_name": "general.license.name", "license_link": "general.license.link"}


def hyperparameters(config: LlamaConfig) -> dict[str, Any]:
    """Everything but what stretches the rotary embedding (see `convert.formats.gguf.rope_write`).

    Raises ValueError for what llama.cpp's graph cannot compute.
    """
    if config.hidden_act != "silu":
        raise ValueError(
            f"hidden_act: found {config.hidden_act!r}, expected 'silu': GGUF has no other"
        )
    if not np.float32(config.rms_norm_eps) > 0:
        raise ValueError(f"rms_norm_eps: found {config.rms_norm_eps}, expected a positive float32")
    if config.head_size % 2:
        raise ValueError(f"head_dim: found {config.head_size}, expected an even number")
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_size,
        "llama.attention.value_length": config.head_size,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_size,
        "llama.rope.freq_base": float(config.rope["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
    }


def description(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """What the model is called; `name` is for a source that does not say."""
    known = {
        _GENERAL.get(key, f"general.{key}"): checkpoint.facts[key]
        for key in ("organization", "license", "license_name", "license_link", "languages")
        if key in checkpoint.facts
    }
    return {
        "general.type": "model",
        "general.name": checkpoint.facts.get("name", name),
        **known,
        "general.size_label": size_label(checkpoint.parameters, 0, 0, 0),
        "general.quantization_version": GGML_QUANT_VERSION,
    }
