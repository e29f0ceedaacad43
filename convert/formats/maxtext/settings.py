"""MaxText's configuration (config.yml) and what it says of a Llama, as Hugging Face's config and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from convert.formats.orbax.arrays import StoredArray
from convert.formats.trees.name_map import NameMap
from convert.formats.trees.read import path_of
from llama_jax.config import LlamaConfig
from llama_jax.numerics.scalars import is_number

FILE = "config.yml"
_MAX_BYTES = 2**22
# the only scaling that MaxText's Llama has; its constants are in the code
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_CONTEXT = 131072
# settings that make another function of the weights, with the value that leaves a plain Llama
_PLAIN: dict[str, Any] = {
    "attention_bias": False,
    "attention_type": "global",
    "attn_logits_soft_cap": 0,
    "decoder_block": "llama2",
    "final_logits_soft_cap": 0,
    "mlp_activations": ["silu", "linear"],
    "mlp_bias": False,
    "num_experts": 1,
    "partial_rotary_factor": 1,
    "quantization": "",
    "rope_min_timescale": 1,
    "share_kv_projections": False,
    "use_multimodal": False,
    "use_qk_norm": False,
}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: a file that cannot be read, is no table, or has a setting that no Llama has.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        settings = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path}: not valid YAML ({text})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: found a {type(settings).__name__}, expected MaxText's settings")
    for name, plain in _PLAIN.items():
        value = settings.get(name, plain)
        if value != plain and value is not None:
            raise ValueError(f"{path}: {name}: found {value!r}, expected {plain!r} of a Llama")
    if (kind := settings.get("rope_type", "default")) not in ("default", "llama3.1"):
        raise ValueError(f"{path}: rope_type: found {kind!r}, expected default or llama3.1")
    return settings


def rope_order(settings: Mapping[str, Any]) -> str | None:
    """The order of the rows of queries and keys; None where the settings leave it open."""
    if {"model_name", "rope_type"} <= settings.keys() or any(
        str(settings.get(name)).startswith("llama3.1") for name in ("model_name", "rope_type")
    ):
        return "pairs" if _is_llama31(settings) else "halves"
    return None


def _is_llama31(settings: Mapping[str, Any]) -> bool:
    return any(
        str(settings.get(name, "default")).startswith("llama3.1")
        for name in ("model_name", "rope_type")
    )


def config_of(
    settings: Mapping[str, Any], dimensions: Mapping[str, Any], rope: str | None
) -> LlamaConfig:
    """The config.json of a model with these settings; what they leave out is MaxText's default.

    Args:
        dimensions: see `dimensions_of`.
        rope: the order of rows, "pairs" of which means MaxText's Llama 3.1.

    Raises:
        ValueError: a setting of the wrong kind, named.
    """

    def number(name: str, default: float) -> float:
        value = settings.get(name, default)
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a text
            with suppress(ValueError):
                value = float(value)
        if not is_number(value) or not math.isfinite(value):
            raise ValueError(f"{name}: found {value!r}, expected a number")
        return float(value)

    parameters: dict[str, Any] = {"rope_type": "default"}
    context = int(number("max_target_length", 2048))
    factor = number("rope_linear_scaling_factor", 1.0)
    if rope == "pairs" or _is_llama31(settings):
        if settings.get("rope_use_scale", True):
            parameters, context = dict(LLAMA3_SCALING), max(context, _LLAMA3_CONTEXT)
    elif factor != 1:
        parameters = {"rope_type": "linear", "factor": factor}
    parameters["rope_theta"] = number("rope_max_timescale", 10000)
    return LlamaConfig(
        **dimensions,
        max_position_embeddings=context,
        rms_norm_eps=number("normalization_layer_epsilon", 1e-5),
        rope_parameters=parameters,
        bos_token_id=None,
        eos_token_id=None,
    )


def dimensions_of(
    arrays: Sequence[StoredArray], name_map: NameMap, axis: int
) -> dict[str, int | bool]:
    """What the shapes of the arrays tell of config.json.

    Raises:
        ValueError: an array that tells some of it is missing or has another number of axes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    layers = 0
    for array in arrays:
        place = None if name_map.ignores(path_of(array)) else name_map.place(path_of(array))
        if place is None:
            continue
        shape, name = tuple(array.store.shape), place.name
        if "{layer}" in name:
            if axis < len(shape):
                layers = max(layers, shape[axis])
            shape = (*shape[:axis], *shape[axis + 1 :])
        elif match := re.fullmatch(r"model\.layers\.(\d+)\..*", name):
            layers = max(layers, int(match[1]) + 1)
        shapes.setdefault(re.sub(r"layers\.[^.]*\.", "", name), shape)

    def shape_of(name: str, axes: int) -> tuple[int, ...]:
        shape = shapes.get(name)
        if shape is None:
            raise ValueError(f"{name}: missing, no array is mapped to it")
        if len(shape) != axes:
            raise ValueError(f"{name}: found shape {list(shape)}, expected {axes} axes")
        return shape

    vocabulary, hidden = shape_of("model.embed_tokens.weight", 2)
    _, heads, head_dim = shape_of("model.self_attn.q_proj.weight", 3)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shape_of("model.mlp.gate_proj.weight", 2)[1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shape_of("model.self_attn.k_proj.weight", 3)[1],
        "head_dim": head_dim,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def settings_of(config: LlamaConfig, scan_layers: bool = True) -> dict[str, Any]:
    """MaxText's settings for a model.

    Raises:
        ValueError: a model that MaxText's Llama cannot express, naming the field.
    """
    for field, expected in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (value := getattr(config, field)) != expected:
            raise ValueError(f"{field}: found {value!r}, expected {expected!r}")
    rope = dict(config.rope_parameters or {})
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    scaling: dict[str, Any] = {"rope_type": "default"}
    if kind == "llama3":
        other = [name for name, value in LLAMA3_SCALING.items() if rope.get(name) != value]
        if other:
            raise ValueError(
                f"rope_parameters[{other[0]!r}]: found {rope.get(other[0])!r}, expected "
                f"{LLAMA3_SCALING[other[0]]!r}"
            )
        scaling = {"rope_type": "llama3.1", "rope_use_scale": True}
    elif kind == "linear":
        scaling["rope_linear_scaling_factor"] = rope["factor"]
    elif kind != "default":
        raise ValueError(f"rope_type: found {kind!r}, expected default, linear or llama3")
    return {
        "base_config": "base.yml",
        "model_name": "default",
        "decoder_block": "llama2",
        "base_emb_dim": config.hidden_size,
        "base_mlp_dim": config.intermediate_size,
        "base_num_decoder_layers": config.num_hidden_layers,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "mlp_activations": ["silu", "linear"],
        "normalization_layer_epsilon": config.rms_norm_eps,
        "logits_via_embedding": config.tie_word_embeddings,
        "normalize_embedding_logits": False,
        "rope_max_timescale": int(theta) if theta == int(theta) else theta,
        "scan_layers": scan_layers,
        "max_target_length": config.max_position_embeddings,
        **scaling,
    }
