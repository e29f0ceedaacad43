"""Hugging Face's rope_parameters in llama.cpp's two mechanisms, which `convert.gguf_rope` describes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float32

from convert.gguf_rope import llama3_factors
from llama_jax.config import LlamaConfig
from llama_jax.rope import inverse_frequencies


def rope_scaling(config: LlamaConfig) -> tuple[dict[str, Any], Float32[np.ndarray, " half"] | None]:
    """Metadata, and `rope_freqs.weight` where frequencies are divided one by one.

    Raises ValueError for what llama.cpp cannot express.
    """
    rope = config.rope
    match rope["rope_type"]:
        case "default":
            return {}, None
        case "linear":
            scaling = {"type": "linear", "factor": float(rope["factor"])}
            return _keys(scaling), None
        case "yarn":
            return _keys(_yarn(config)), None
        case "llama3":
            return {}, _llama3(config)
        case "longrope":
            return {}, _longrope(config)
        case other:
            raise ValueError(
                f"rope_type: found {other!r}, expected default, linear, yarn, llama3 or longrope: "
                "GGUF's llama has no other"
            )


def _keys(scaling: dict[str, Any]) -> dict[str, Any]:
    return {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}


def _yarn(config: LlamaConfig) -> dict[str, Any]:
    rope = config.rope
    if not rope.get("truncate", True):
        raise ValueError(
            "rope_parameters['truncate']: found False, expected True: GGUF has no other"
        )
    if rope["factor"] < 1:
        raise ValueError(f"rope_parameters['factor']: found {rope['factor']}, expected at least 1")
    context = rope["original_max_position_embeddings"]
    if context != int(context):
        raise ValueError(
            f"rope_parameters['original_max_position_embeddings']: found {context}, expected an integer"
        )
    _, attention = inverse_frequencies(
        rope, config.head_size, config.max_position_embeddings, length=1
    )
    # llama.cpp multiplies this by 0.1 ln(factor) + 1
    scaling = {"attn_factor": attention / (0.1 * math.log(rope["factor"]) + 1.0)}
    return {
        "type": "yarn",
        "factor": float(rope["factor"]),
        "original_context_length": int(context),
        **({} if math.isclose(scaling["attn_factor"], 1.0) else scaling),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
    }


def _llama3(config: LlamaConfig) -> Float32[np.ndarray, " half"]:
    rope, head_dim = config.rope, config.head_size
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    factors = llama3_factors(
        float(rope["rope_theta"]) ** -exponents,
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    return factors.astype(np.float32)


def _longrope(config: LlamaConfig) -> Float32[np.ndarray, " half"]:
    """The factors, where they are the same at every length.

    llama.cpp chooses between two lists by the context it is started with, Hugging Face by the current
    length: they are not the same function.
    """
    rope = config.rope
    if list(rope["short_factor"]) != list(rope["long_factor"]):
        raise ValueError(
            "rope_parameters['long_factor']: found another list than short_factor, expected the same: "
            "GGUF cannot choose by the current length"
        )
    _, attention = inverse_frequencies(
        rope, config.head_size, config.max_position_embeddings, length=1
    )
    if not math.isclose(attention, 1.0, rel_tol=1e-6):
        raise ValueError(
            f"rope_parameters['attention_factor']: found {attention:g}, expected 1: "
            "GGUF's llama has none beside rope_freqs.weight"
        )
    return np.asarray(rope["short_factor"], np.float32)
