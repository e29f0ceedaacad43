"""Hugging Face's rope_parameters in llama.cpp's two mechanisms, see `convert.formats.gguf.rope`.

Metadata where llama.cpp has the formula, `rope_freqs.weight` for all other frequencies that stay the same
at every length. Of yarn's constants, `llama` reads the factor, the original context and the factor on cos
and sin; its ramp is that of beta_fast 32 and beta_slow 1 whatever the file says.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float32

from llama_jax.config import LlamaConfig
from llama_jax.numerics.rope import inverse_frequencies


def rope_scaling(config: LlamaConfig) -> tuple[dict[str, Any], Float32[np.ndarray, " half"] | None]:
    """Metadata, and `rope_freqs.weight` where frequencies are divided one by one.

    Raises ValueError for frequencies that depend on the current length, or are zero.
    """
    rope = config.rope
    shape = config.head_size, config.max_position_embeddings
    frequencies, attention = inverse_frequencies(rope, *shape, length=1)
    if not np.array_equal(frequencies, inverse_frequencies(rope, *shape, length=2**31)[0]):
        raise ValueError(
            f"rope_type: found {rope['rope_type']!r} with frequencies that depend on the current length, "
            "expected constant ones: GGUF's llama has no others"
        )
    if not np.all(frequencies):
        raise ValueError(
            f"rope_type: found {rope['rope_type']!r} with features that are not rotated, expected none: "
            "GGUF's llama turns the whole head"
        )
    match rope["rope_type"]:
        case "default":
            return {}, None
        case "linear":
            return _keys({"type": "linear", "factor": float(rope["factor"])}), None
        case "yarn" if _is_llama_cpps(rope):
            # llama.cpp multiplies this by 0.1 ln(factor) + 1
            attention /= 0.1 * math.log(rope["factor"]) + 1.0
            scaling = {
                "type": "yarn",
                "factor": float(rope["factor"]),
                "original_context_length": int(rope["original_max_position_embeddings"]),
            }
            return _keys(scaling, attention), None
    exponents = np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    factors = float(rope["rope_theta"]) ** -exponents / frequencies
    return _keys({}, attention), factors.astype(np.float32)


def _is_llama_cpps(rope: Any) -> bool:
    """Whether yarn's constants are those of llama.cpp's formula."""
    context = rope["original_max_position_embeddings"]
    ramp = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)
    return ramp == (32, 1, True) and context == int(context) and rope["factor"] >= 1


def _keys(scaling: dict[str, Any], attention: float = 1.0) -> dict[str, Any]:
    """The metadata; `attention` is a factor on cos and sin."""
    if not math.isclose(attention, 1.0, rel_tol=1e-12):
        scaling = {**scaling, "attn_factor": attention}
    return {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
