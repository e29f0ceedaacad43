"""Meta's `params.json`, and the config.json that means the same.

The keys and the arithmetic are those of Meta's `ModelArgs` and `FeedForward` (github.com/meta-llama,
llama and llama-models). Where a key says less than Hugging Face's config needs, a note says what is
assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.config import DEFAULT_ROPE_THETA, LlamaConfig

Params = Mapping[str, Any]

_REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
_KNOWN = {
    *_REQUIRED,
    *("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "rope_theta"),
    *("use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
    *("max_seq_len", "max_batch_size"),
}
# dim and n_layers of the two models whose factor is another and not in their params.json
_LLAMA_32_SHAPES = {(2048, 16), (3072, 28)}
# those of the published models, so that their params.json come back as they were
_MULTIPLES = (256, 1024, 4096)
_MULTIPLIERS = (None, 1.0, 1.2, 1.3, 1.5)


def config_of(
    params: Params, *, vocab_size: int, tied: bool, config_json: LlamaConfig | None
) -> tuple[LlamaConfig, list[str]]:
    """The config of a `params.json`, and notes on what it does not say.

    Args:
        vocab_size: rows of the embedding, for files that say -1.
        tied: whether the output projection is the embedding.
        config_json: the config.json in the same directory, for what params.json has no key for.

    Raises:
        ValueError: a key that is missing, of another type or out of range, or not known here.
    """
    for name in _REQUIRED:
        if name not in params:
            raise ValueError(f"{name}: not found, expected the keys {', '.join(_REQUIRED)}")
    for name, value in params.items():
        if name not in _KNOWN and not _is_absent(value):
            raise ValueError(f"{name}: found {str(value)[:80]}, which no Llama 1, 2 or 3 has")
    dim, layers, heads = (_integer(params, name) for name in ("dim", "n_layers", "n_heads"))
    norm_eps = _number(params, "norm_eps", 0.0)
    rope, notes = _rope(params, dim, layers, config_json)
    context = _integer(params, "max_seq_len", 0)
    if not context and config_json is not None:
        context = config_json.max_position_embeddings
    elif not context:
        context = _published_context(rope, norm_eps)
        notes.append(
            f"max_position_embeddings is assumed to be {context}: params.json does not say"
        )
    is_llama_3 = vocab_size == 128256
    return LlamaConfig(
        vocab_size=_integer(params, "vocab_size", vocab_size),
        hidden_size=dim,
        intermediate_size=intermediate_size(params),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_integer(params, "n_kv_heads", heads),
        max_position_embeddings=context,
        rms_norm_eps=norm_eps,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        bos_token_id=128000 if is_llama_3 else 1,
        eos_token_id=128001 if is_llama_3 else 2,
    ), notes


def _rope(
    params: Params, dim: int, layers: int, config_json: LlamaConfig | None
) -> tuple[dict[str, Any], list[str]]:
    """Hugging Face's `rope_parameters`, and notes."""
    theta = _number(params, "rope_theta", DEFAULT_ROPE_THETA)
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}, []
    notes = []
    factor = _number(params, "rope_scaling_factor", 0.0)
    if not factor and config_json is not None:
        factor = config_json.rope.get("factor", 0.0)
    if not factor:
        is_llama_32 = (dim, layers) in _LLAMA_32_SHAPES
        factor = 32.0 if is_llama_32 else 8.0
        notes.append(
            f"the factor of use_scaled_rope is assumed to be {factor:g}, "
            f"that of Llama 3.{2 if is_llama_32 else 1}: params.json does not say"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": _number(params, "rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }, notes


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
            fields: dict[str, Any] = {"multiple_of": multiple}
            if multiplier is not None:
                fields["ffn_dim_multiplier"] = multiplier
            if intermediate_size({"dim": dim, **fields}) == width:
                return fields
    # half a unit above, which truncation removes again, however the multiplication is rounded
    return {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / (8 * dim // 3)}


def _published_context(rope: Mapping[str, Any], norm_eps: float) -> int:
    """The context of the published model with these constants."""
    if rope["rope_type"] == "llama3":
        return 131072
    if rope["rope_theta"] == DEFAULT_ROPE_THETA:
        return 2048 if norm_eps <= 1e-6 else 4096  # Llama 1 and 2
    return 16384 if rope["rope_theta"] == 1e6 else 8192  # Code Llama, Llama 3


def _is_absent(value: Any) -> bool:
    """Whether a key says no more than if it were missing: null, false or -1."""
    return value is None or value is False or (type(value) is int and value == -1)


def _integer(params: Params, name: str, default: int | None = None) -> int:
    value = params.get(name)
    if default is not None and _is_absent(value):
        return default
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name}: found {str(value)[:80]}, expected a positive integer")
    return value


def _number(params: Params, name: str, default: float) -> float:
    value = params.get(name)
    if _is_absent(value):
        return default
    if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
        raise ValueError(f"{name}: found {str(value)[:80]}, expected a positive number")
    return value  # type: ignore[return-value]
