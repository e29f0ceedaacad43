"""Whether two config.json describe the same function of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.numerics.rope import inverse_frequencies

_EXACT = (  # with the norm's epsilon and rope, all that decides what the weights compute
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_heads",
    "head_size",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
_RELATIVE_TOLERANCE = 1e-6  # formats store float32, and compute with it: a few roundings


def config_differences(config: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Every field in which `config` makes another function than `expected`, in words; [] if none.

    Both are the content of a config.json. RoPE is compared by its frequencies, for formats spell the same
    ones differently.

    Raises:
        ValueError: one of them is not a Llama's config.

    >>> config_differences({"hidden_act": "gelu"}, {"hidden_act": "silu"})
    ["hidden_act 'gelu', expected 'silu'"]
    """
    one, other = LlamaConfig.from_dict(config), LlamaConfig.from_dict(expected)
    differences = [
        f"{name} {getattr(one, name)!r}, expected {getattr(other, name)!r}"
        for name in _EXACT
        if getattr(one, name) != getattr(other, name)
    ]
    if not np.isclose(one.rms_norm_eps, other.rms_norm_eps, rtol=_RELATIVE_TOLERANCE, atol=0):
        differences.append(f"rms_norm_eps {one.rms_norm_eps}, expected {other.rms_norm_eps}")
    if not differences and not _same_rope(one, other):
        differences.append(f"rope_parameters {dict(one.rope)}, expected {dict(other.rope)}")
    return differences


def _same_rope(one: LlamaConfig, other: LlamaConfig) -> bool:
    """Whether both rotate alike: at one position, at the context's end, and far beyond it."""
    context = other.max_position_embeddings
    for length in (1, context, 4 * context):
        (frequencies, factor), (other_frequencies, other_factor) = (
            inverse_frequencies(c.rope, c.head_size, c.max_position_embeddings, length)
            for c in (one, other)
        )
        if not np.allclose(frequencies, other_frequencies, rtol=_RELATIVE_TOLERANCE, atol=0):
            return False
        if not np.isclose(factor, other_factor, rtol=_RELATIVE_TOLERANCE):
            return False
    return True
