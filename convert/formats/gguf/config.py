"""A Llama's hyperparameters: config.json from GGUF metadata, and the metadata of a config.

Keys, defaults and what llama.cpp's graph does with them are those of its `llama` architecture. RoPE
scaling is in `convert.formats.gguf.rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.formats.gguf.header import GgufHeader
from convert.formats.gguf.keys import Keys
from llama_jax.config import LlamaConfig

# Hyperparameters that llama.cpp's graph would obey and Hugging Face's Llama has no field for, with the
# values under which they do nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
}


def read_config(header: GgufHeader, keys: Keys) -> tuple[dict[str, Any], list[str]]:
    """The content of config.json without rope_parameters, from the metadata and the tensors' names.

    Args:
        keys: reads below `llama.`; problems are added to it.

    Returns:
        The fields, and notes on what is ignored.
    """
    layers = keys.integer("block_count", below=max(2, len(header.tensors)))
    hidden_size = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        keys.problems.append(
            f"llama.attention.head_count is {heads}, expected a multiple of {kv_heads}"
        )
    head_dim = _head_dim(header, keys, hidden_size, heads)
    _require_plain_llama(header.metadata, keys, head_dim)
    epsilon = keys.number("attention.layer_norm_rms_epsilon")
    if not epsilon > 0.0:
        keys.problems.append(
            f"llama.attention.layer_norm_rms_epsilon is {epsilon}, expected above 0"
        )
    vocab_size = _vocab_size(header, keys)
    special_ids, notes = _special_ids(header.metadata, vocab_size)
    if window := header.metadata.get("llama.attention.sliding_window"):
        notes.append(f"llama.attention.sliding_window {window} is ignored: Llama has none")
    biased = {
        name.split(".")[2]
        for name in header.tensors
        if name.endswith(".bias") and name.count(".") == 3
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "initializer_range": 0.02,
        "rms_norm_eps": epsilon,
        "use_cache": True,
        "pretraining_tp": 1,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": any(module.startswith("attn_") for module in biased),
        "attention_dropout": 0.0,
        "mlp_bias": any(module.startswith("ffn_") for module in biased),
        **special_ids,
    }, notes


def _head_dim(header: GgufHeader, keys: Keys, hidden_size: int, heads: int) -> int:
    """The size of a head; all keys that could say another one must say the same."""
    query = header.tensors.get("blk.0.attn_q.weight")
    derived = (query.shape[0] if query else hidden_size) // heads
    head_dim = keys.integer("attention.key_length", derived or 1)
    for key, meaning in [
        ("attention.value_length", "heads whose values are as wide as their keys"),
        ("rope.dimension_count", "rotary embedding over the whole head, not a part of it"),
    ]:
        if (size := keys.integer(key, head_dim)) != head_dim:
            keys.problems.append(f"llama.{key} is {size}, expected {head_dim}: {meaning}")
    if head_dim % 2:
        keys.problems.append(f"the head dimension is {head_dim}, expected an even number")
    return head_dim


def _require_plain_llama(metadata: Mapping[str, Any], keys: Keys, head_dim: int) -> None:
    """Everything that would make another function of the weights than Hugging Face's Llama."""
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(f"llama.{key}", neutral[0])
        if value not in neutral:
            keys.problems.append(
                f"llama.{key} is {value!r}, expected {neutral[-1]}: "
                "Hugging Face's Llama does not support it"
            )
    scale = keys.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        keys.problems.append(f"llama.attention.scale is {scale}, expected 1/sqrt({head_dim})")


def _vocab_size(header: GgufHeader, keys: Keys) -> int:
    """Rows of the embedding; the number of tokens, or without them the metadata, must agree."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    stated = len(tokens) if isinstance(tokens, list) else header.metadata.get("llama.vocab_size")
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding else stated
    if not isinstance(rows, int) or rows < 1:
        keys.problems.append(f"the vocabulary size is {rows!r}, expected a positive integer")
        return 1
    if stated is not None and stated != rows:
        keys.problems.append(f"token_embd.weight has {rows} rows, expected {stated}, one per token")
    return rows


def _special_ids(
    metadata: Mapping[str, Any], vocab_size: int
) -> tuple[dict[str, int | None], list[str]]:
    """bos, eos and pad, and notes; llama.cpp's SentencePiece vocabularies default to 1 and 2."""
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    ids: dict[str, int | None] = {}
    notes = []
    for name, key, default in [("bos", "bos", 1), ("eos", "eos", 2), ("pad", "padding", None)]:
        full_key = f"tokenizer.ggml.{key}_token_id"
        value = metadata.get(full_key, default if sentencepiece else None)
        if value is not None and not (type(value) is int and 0 <= value < vocab_size):
            notes.append(f"{full_key} {value!r} is outside the vocabulary and ignored")
            value = None
        ids[f"{name}_token_id"] = value
    return ids, notes


def hyperparameters(config: LlamaConfig) -> dict[str, Any]:
    """The metadata of a config, without RoPE scaling.

    Raises:
        ValueError: something that llama.cpp's graph cannot compute.
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
