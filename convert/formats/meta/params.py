"""Meta's `params.json`, and the config.json that means the same.

The keys and the arithmetic are those of Meta's `ModelArgs` and `FeedForward` (github.com/meta-llama,
llama and llama-models). Where a key says less than Hugging Face's config wants to know, what is assumed
is told in a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.config import DEFAULT_ROPE_THETA, LlamaConfig

Params = Mapping[str, Any]

_NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
_KNOWN = {
    *_NEEDED,
    *("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "rope_theta"),
    *("use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
    *("max_seq_len", "max_batch_size"),
}
_ABSENT = (None, False, -1)
# dim and layers of the two models whose scaling differs, and is not in their params.json: Llama 3.2
_FACTOR_32 = {(2048, 16), (3072, 28)}
# of the published models, to have them back as they were
_MULTIPLES = (256, 1024, 4096)
_MULTIPLIERS = (None, 1.0, 1.2, 1.3, 1.5)


def config_of(
    params: Params, *, vocab_size: int, tied: bool, beside: LlamaConfig | None
) -> tuple[LlamaConfig, list[str]]:
    """The config of a `params.json`, and notes on what it does not say.

    Args:
        vocab_size: rows of the embedding, for files that say -1.
        tied: whether the output projection is the embedding.
        beside: a config.json that lies in the same directory; for what params.json has no key for.

    Raises:
        ValueError: a key that is missing, of another type or out of range, or not known here.
    """
    for name in _NEEDED:
        if name not in params:
            raise ValueError(f"{name}: not found, expected the keys {', '.join(_NEEDED)}")
    for name, value in params.items():
        if name not in _KNOWN and not any(value is absent for absent in _ABSENT):
            raise ValueError(f"{name}: found {str(value)[:80]}, which is not of a Llama 1, 2 or 3")
    dim, layers, heads = (_integer(params, name) for name in ("dim", "n_layers", "n_heads"))
    norm_eps = _number(params, "norm_eps", 0.0)
    notes: list[str] = []
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _number(params, "rope_theta", DEFAULT_ROPE_THETA),
    }
    if params.get("use_scaled_rope"):
        factor = _number(params, "rope_scaling_factor", 0.0)
        if not factor and beside is not None:
            factor = beside.rope.get("factor", 0.0)
        if not factor:
            factor = 32.0 if (dim, layers) in _FACTOR_32 else 8.0
            notes.append(
                f"use_scaled_rope is taken as a factor of {factor:g}, "
                f"that of Llama 3.{2 if factor == 32 else 1}: params.json does not say"
            )
        rope |= {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": _number(params, "rope_high_freq_factor", 4.0),
            "original_max_position_embeddings": 8192,
        }
    context = _integer(params, "max_seq_len", 0)
    if not context and beside is None:
        context = _published_context(rope, norm_eps)
        notes.append(f"max_position_embeddings is taken as {context}: params.json does not say")
    return LlamaConfig(
        vocab_size=_integer(params, "vocab_size", vocab_size),
        hidden_size=dim,
        intermediate_size=intermediate_size(params),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_integer(params, "n_kv_heads", heads),
        max_position_embeddings=context or (beside.max_position_embeddings if beside else 0),
        rms_norm_eps=norm_eps,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        bos_token_id=128000 if vocab_size == 128256 else 1,
        eos_token_id=128001 if vocab_size == 128256 else 2,
    ), notes


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """The `params.json` of a config, as far as the format goes: `config_of` tells what it means."""
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope["rope_theta"],
        **_feed_forward(config.hidden_size, config.intermediate_size),
    }
    if config.rope["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = config.rope["factor"]
        if config.rope["high_freq_factor"] != 4:
            params["rope_high_freq_factor"] = config.rope["high_freq_factor"]
    return params


def intermediate_size(params: Params) -> int:
    """Width of the feed-forward layers: 2/3 of 4 dim, times the multiplier, rounded up."""
    multiple = _integer(params, "multiple_of", 256)
    hidden = 8 * _integer(params, "dim") // 3
    multiplier = _number(params, "ffn_dim_multiplier", 0.0)
    if multiplier:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple) * multiple


def _feed_forward(dim: int, width: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` that give the width exactly."""
    for multiple in _MULTIPLES:
        for multiplier in _MULTIPLIERS:
            found: dict[str, Any] = {"multiple_of": multiple}
            if multiplier is not None:
                found["ffn_dim_multiplier"] = multiplier
            if intermediate_size({"dim": dim, **found}) == width:
                return found
    # half a unit above, which truncation takes off again whatever the rounding
    return {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / (8 * dim // 3)}


def _published_context(rope: Mapping[str, Any], norm_eps: float) -> int:
    """The context of the published model with these constants."""
    if rope["rope_type"] == "llama3":
        return 131072
    if rope["rope_theta"] == DEFAULT_ROPE_THETA:
        return 2048 if norm_eps <= 1e-6 else 4096  # Llama 1 and 2
    return 16384 if rope["rope_theta"] == 1e6 else 8192  # Code Llama, Llama 3


def _integer(params: Params, name: str, default: int | None = None) -> int:
    value = params.get(name)
    if default is not None and any(value is absent for absent in _ABSENT):
        return default
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name}: found {str(value)[:80]}, expected a positive integer")
    return value


def _number(params: Params, name: str, default: float) -> float:
    value = params.get(name)
    if any(value is absent for absent in _ABSENT):
        return default
    if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
        raise ValueError(f"{name}: found {str(value)[:80]}, expected a positive number")
    return value  # type: ignore[return-value]
