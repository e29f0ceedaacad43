"""LitGPT's `model_config.yaml`, and the config.json that means the same."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from llama_jax.config import LlamaConfig
from llama_jax.formatting import first_line

FILE = "model_config.yaml"
OLD_FILE = "lit_config.json"  # of early versions, with the same keys
_MAX_BYTES = 2**20
# what every Llama has; of other models in LitGPT's file, one of these differs
_LLAMA: dict[str, Any] = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,  # 0.25 by default
    "parallel_residual": False,
    "shared_attention_norm": False,
}
_OLD_KEYS = {"norm_class_name": "_norm_class", "mlp_class_name": "_mlp_class"}
# what is not in a Llama, and must be absent, false, 0 or null
_ABSENT = (
    *("norm_qk", "post_attention_norm", "post_mlp_norm", "attention_scores_scalar"),
    *("sliding_window_size", "attention_logit_softcapping", "final_logit_softcapping"),
    *("rope_interleave", "rope_local_base_freq", "n_expert", "n_shared_expert"),
    *("latent_attention", "scale_embeddings", "lm_head_bias", "attn_bias"),
)
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
_BIASED = "attn_bias"  # of the queries, keys and values alone, which is no Llama's


def read_fields(path: Path) -> dict[str, Any]:
    """The content of a `model_config.yaml`, or of a `lit_config.json`, by its present keys.

    Raises:
        ValueError: a file that is neither.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, expected at most {_MAX_BYTES}")
        fields = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # yaml raises whatever the damage leads it to
        raise ValueError(f"{path}: not valid YAML ({first_line(error)})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: found a {type(fields).__name__}, expected keys and values")
    return {new: fields[old] for new, old in _OLD_KEYS.items() if old in fields} | fields


def config_of(fields: Mapping[str, Any], *, vocab_size: int, tied: bool) -> LlamaConfig:
    """The config that a `model_config.yaml` means.

    Args:
        vocab_size: rows of the embedding, the padding with them.
        tied: whether the head is the embedding, which the file does not say.

    Raises:
        ValueError: a key that is missing, out of range or not a Llama's.
    """
    for name, expected in _LLAMA.items():
        default = False if expected is False else None
        if fields.get(name, default) != expected:
            raise ValueError(f"{name}: found {fields.get(name)!r:.80}, a Llama has {expected!r}")
    for name in _ABSENT:
        if fields.get(name) not in (None, False, 0) and not (
            name == _BIASED and fields.get("bias") is True
        ):
            raise ValueError(f"{name}: found {fields[name]!r:.80}, which no Llama has")
    if type(fields.get("bias")) is not bool:
        raise ValueError(f"bias: found {fields.get('bias')!r:.80}, expected true or false")
    heads, hidden = _integer(fields, "n_head"), _integer(fields, "n_embd")
    biased = fields["bias"]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=_integer(fields, "intermediate_size"),
        num_hidden_layers=_integer(fields, "n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=_integer(fields, "n_query_groups", heads),
        head_dim=_integer(fields, "head_size", hidden // heads),
        max_position_embeddings=_integer(fields, "block_size"),
        rms_norm_eps=_number(fields, "norm_eps", 1e-5),
        tie_word_embeddings=tied,
        rope_parameters=_rope(fields),
        attention_bias=biased,
        mlp_bias=biased,
    )


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's `rope_parameters`."""
    if "rope_base" not in fields:
        raise ValueError("rope_base: not found")
    theta, condensed = _number(fields, "rope_base"), _number(fields, "rope_condense_ratio", 1)
    adjusted = fields.get("rope_adjustments")
    if adjusted is None:
        if condensed == 1:
            return {"rope_type": "default", "rope_theta": theta}
        return {"rope_type": "linear", "rope_theta": theta, "factor": condensed}
    if not isinstance(adjusted, dict) or condensed != 1:
        raise ValueError(f"rope_adjustments: found {adjusted!r:.80}, with a ratio of {condensed}")
    if adjusted.keys() == {"factor"}:
        return {"rope_type": "linear", "rope_theta": theta, "factor": _number(adjusted, "factor")}
    if adjusted.keys() != _LLAMA3.keys():
        raise ValueError(
            f"rope_adjustments: found the keys {', '.join(map(str, adjusted))}, expected "
            f"{', '.join(_LLAMA3)}"
        )
    values = {ours: _number(adjusted, name) for name, ours in _LLAMA3.items()}
    values["original_max_position_embeddings"] = _integer(adjusted, "original_max_seq_len")
    return {"rope_type": "llama3", "rope_theta": theta, **values}


def fields_of(config: LlamaConfig, name: str) -> dict[str, Any]:
    """The `model_config.yaml` of a config, as far as the format goes: `config_of` tells what it means."""
    rope = config.rope
    adjusted = None
    if rope["rope_type"] == "llama3":
        adjusted = {theirs: rope[ours] for theirs, ours in _LLAMA3.items()}
    theta = rope["rope_theta"]
    return {
        "name": name,
        "hf_config": {},
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.kv_heads,
        "n_embd": config.hidden_size,
        "head_size": config.head_size,
        "intermediate_size": config.intermediate_size,
        "bias": config.attention_bias,
        "norm_eps": config.rms_norm_eps,
        "rope_base": int(theta) if theta == int(theta) else theta,
        "rope_condense_ratio": rope["factor"] if rope["rope_type"] == "linear" else 1,
        "rope_adjustments": adjusted,
        **_LLAMA,
    }


def _integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value: Any = fields.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"{name}: found {value!r:.80}, expected a positive integer")
    return int(value)


def _number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value: Any = fields.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, str):  # YAML takes 1e-05 for a text
        with suppress(ValueError):
            value = float(value)
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{name}: found {value!r:.80}, expected a positive number")
    return float(value)
