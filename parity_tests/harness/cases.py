"""The test matrix: every kind of Llama and every kind of input, as data.

A `Case` is a tiny Hugging Face config and a description of its inputs. `weights_of` and `inputs_of` draw
its weights and inputs from a seed; all of them are float32 values, so that every precision starts from the
same numbers. Nothing is trivial: norm weights are not one, biases are not zero, masks hide keys that would
matter.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFLlama
from transformers import PreTrainedModel

from parity_tests.reference.oracle import IGNORE

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of a call of the model; None or 0 leaves one out.

    mask: zeros at the end, at the start, or anywhere. positions: `shifted` from zero by a different
    amount in each row, `far` past every context, `scattered` in no order. segments: several packed
    documents, with positions from zero in each. labels: at `all` positions, at `some`, at none of the
    first row (`one_row_empty`), or at `none` of the batch. keep: `logits_to_keep`, a number or an `index`.
    """

    batch: int = 2
    length: int = 11
    mask: Literal["right", "left", "holes"] | None = None
    positions: Literal["shifted", "far", "scattered"] | None = None
    embeds: bool = False
    segments: bool = False
    labels: Literal["all", "some", "one_row_empty", "none"] | None = "all"
    num_items: int | None = None
    keep: int | Literal["index"] = 0


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    config: Config
    inputs: Inputs = Inputs()

    def __repr__(self) -> str:
        return self.name


BASE: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,  # a prime: no block size divides it
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def case(name: str, inputs: Inputs | None = None, **changes: Any) -> Case:
    """The base model with some fields changed. `rope_parameters` replaces v4's `rope_theta`."""
    config = BASE | changes
    if "rope_parameters" in changes:
        del config["rope_theta"]
    return Case(name, config, inputs or Inputs())


def scaled(kind: str, theta: float = 100.0, **fields: Any) -> Config:
    """A rotary scaling in the v5 layout.

    With the low base, the wavelengths of a head of 16 lie on both sides of those at which the scalings
    change, even for contexts as short as these.
    """
    return {
        "head_dim": 16,
        "rope_parameters": {"rope_type": kind, "rope_theta": theta} | fields,
    }


SHORT = [1.0, 1.05, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0]
LONG = [1.1, 1.3, 1.7, 2.2, 3.0, 5.0, 7.5, 9.0]
LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_32 = LLAMA_31 | {"factor": 32.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 16,
}
# Past the original context of every scaling below.
PAST = Inputs(length=40)

HEADS = [
    case("mha", num_key_value_heads=4),
    case("gqa_2_to_1"),
    case("gqa_4_to_1", num_attention_heads=8),
    case("gqa_3_to_1", num_attention_heads=6, hidden_size=48),
    case("mqa", num_key_value_heads=1),
    case("head_dim_wider", head_dim=12),
    case("head_dim_narrower", head_dim=4, num_key_value_heads=1),
]

FIELDS = [
    case("tied", tie_word_embeddings=True),
    # transformers gives the embedding of the padding token no gradient, at any position
    case("padding_token", pad_token_id=5),
    case("padding_token_negative_tied", pad_token_id=-1, tie_word_embeddings=True),
    case("attention_bias", attention_bias=True),
    case("mlp_bias", mlp_bias=True),
    case("eps_1e-6", rms_norm_eps=1e-6),
    case("one_layer", num_hidden_layers=1),
    case("three_layers", num_hidden_layers=3),
    case("pretraining_tp", pretraining_tp=2),
    case("dropout_off", attention_dropout=0.5),
    case("theta_500000", rope_theta=500000.0),
    *(
        case(f"act_{name}", hidden_act=name)
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
    ),
]

# Only tested one by one as components, and in the oracle: they differ in one line of code.
MORE_ACTIVATIONS = [
    case(f"act_{name}", hidden_act=name)
    for name in (
        *("gelu_python", "gelu_10", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
        *("quick_gelu", "swish", "hardswish", "relu2", "relu6", "leaky_relu", "mish"),
        *("sqrtsoftplus", "laplace", "sigmoid", "tanh", "linear"),
    )
]

ROPES = [
    case("rope_default_v5", **scaled("default")),
    case("rope_default_far", Inputs(positions="far")),
    case("rope_linear", PAST, **scaled("linear", factor=4.0)),
    case("rope_linear_v4", PAST, rope_scaling={"type": "linear", "factor": 3.0}),
    case("rope_dynamic_within", **scaled("dynamic", factor=4.0), max_position_embeddings=16),
    case("rope_dynamic_past", PAST, **scaled("dynamic", factor=4.0), max_position_embeddings=16),
    case("rope_yarn", PAST, **scaled("yarn", **YARN)),
    case("rope_yarn_untruncated", PAST, **scaled("yarn", **YARN, truncate=False)),
    case("rope_yarn_mscale", PAST, **scaled("yarn", **YARN, mscale=0.7, mscale_all_dim=1.3)),
    case("rope_yarn_beta", PAST, **scaled("yarn", **YARN, beta_fast=4.0, beta_slow=0.25)),
    case("rope_yarn_attention_factor", PAST, **scaled("yarn", **YARN, attention_factor=0.8)),
    case(
        "rope_yarn_v4",
        PAST,
        head_dim=16,
        rope_scaling={"type": "yarn", "rope_type": "yarn", **YARN},
    ),
    case("rope_longrope_short", **scaled("longrope", **LONGROPE)),
    case("rope_longrope_long", PAST, **scaled("longrope", **LONGROPE)),
    case("rope_longrope_factor", PAST, **scaled("longrope", **LONGROPE, factor=8.0)),
    case(
        "rope_longrope_attention_factor",
        Inputs(positions="far"),
        **scaled("longrope", **LONGROPE, attention_factor=1.3),
    ),
    case(
        "rope_llama31",
        PAST,
        **scaled("llama3", **LLAMA_31, original_max_position_embeddings=32),
        max_position_embeddings=256,
    ),
    case(
        "rope_llama32_v4",
        PAST,
        head_dim=16,
        rope_theta=100.0,
        rope_scaling={
            "rope_type": "llama3",
            **LLAMA_32,
            "original_max_position_embeddings": 32,
        },
        max_position_embeddings=1024,
    ),
    case(
        "rope_proportional_quarter",
        PAST,
        **scaled("proportional", partial_rotary_factor=0.25),
    ),
    case("rope_proportional_whole", **scaled("proportional", factor=2.0)),
]

INPUTS = [
    case("mask_right", Inputs(mask="right", labels="some")),
    case("mask_left", Inputs(mask="left")),
    case("mask_holes", Inputs(mask="holes", batch=3)),
    case("positions_shifted", Inputs(positions="shifted")),
    case("positions_scattered", Inputs(positions="scattered")),
    case("embeds", Inputs(embeds=True)),
    case("segments", Inputs(segments=True, length=17)),
    case("segments_and_padding", Inputs(segments=True, mask="right", length=17)),
    case("labels_some", Inputs(labels="some")),
    case("labels_one_row_empty", Inputs(labels="one_row_empty")),
    case("labels_none", Inputs(labels="none")),
    case("num_items", Inputs(labels="some", num_items=37)),
    case("keep_last", Inputs(labels=None, keep=3)),
    case("keep_index", Inputs(labels=None, keep="index")),
    case("no_labels", Inputs(labels=None)),
    case("length_1", Inputs(length=1, labels=None)),
    case("batch_1", Inputs(batch=1)),
]

COMBINATIONS = [
    case(
        "everything",
        Inputs(mask="left", positions="scattered", labels="some", num_items=29, length=40),
        **scaled("llama3", **LLAMA_31, original_max_position_embeddings=32),
        max_position_embeddings=256,
        num_attention_heads=6,
        hidden_size=48,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        pretraining_tp=2,
    ),
    case(
        "packed_yarn_mqa",
        Inputs(segments=True, embeds=True, batch=1, length=37),
        **scaled("yarn", **YARN),
        num_key_value_heads=1,
        attention_bias=True,
    ),
    case(
        "dynamic_left_tied",
        Inputs(mask="left", positions="shifted", length=23, labels="some"),
        **scaled("dynamic", factor=2.0),
        max_position_embeddings=16,
        tie_word_embeddings=True,
    ),
    case(
        "longrope_holes_keep",
        Inputs(mask="holes", labels=None, keep="index", length=20),
        **scaled("longrope", **LONGROPE, factor=2.0),
        num_key_value_heads=4,
        mlp_bias=True,
    ),
]

MATRIX = [*HEADS, *FIELDS, *ROPES, *INPUTS, *COMBINATIONS]
BY_NAME = {c.name: c for c in [*MATRIX, *MORE_ACTIVATIONS]}
assert len(BY_NAME) == len(MATRIX) + len(MORE_ACTIVATIONS), "two cases share a name"


# Numbers -----------------------------------------------------------------------------------------


def inputs_of(inputs: Inputs, config: Config, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for a call of the model: numpy arrays (int64, float32) and ints.

    Hugging Face's model takes no `segment_ids`: `hf_inputs` makes a mask of them.
    """
    rng = np.random.default_rng([seed, 1])
    shape = batch, length = inputs.batch, inputs.length
    tokens = rng.integers(0, config["vocab_size"], shape)
    arguments: dict[str, Any] = {}
    if inputs.embeds:
        arguments["inputs_embeds"] = rng.normal(size=(*shape, config["hidden_size"])).astype(
            "float32"
        )
    else:
        arguments["input_ids"] = tokens

    steps = np.arange(length)
    if inputs.segments:
        # Documents of different lengths in each row, with positions from zero in each.
        starts = (rng.random(shape) < 4 / length) | (steps == 0)
        arguments["segment_ids"] = starts.cumsum(1)
        last_start = np.maximum.accumulate(np.where(starts, steps, 0), axis=1)
        arguments["position_ids"] = steps - last_start
    if inputs.positions == "shifted":
        arguments["position_ids"] = steps + rng.integers(1, 9, (batch, 1))
    if inputs.positions == "far":
        arguments["position_ids"] = steps + 1000 + rng.integers(0, 100, (batch, 1))
    if inputs.positions == "scattered":
        arguments["position_ids"] = rng.integers(0, 2 * length, shape)

    if inputs.mask == "holes":
        # The first row starts with masked tokens, so that its first queries see nothing at all.
        mask = rng.random(shape) < 0.7
        mask[0, : max(1, length // 4)] = False
        arguments["attention_mask"] = mask.astype(np.int64)
    elif inputs.mask is not None:
        # The first row is not padded, the others are, by different amounts.
        pad = rng.integers(1, max(2, length // 2 + 1), (batch, 1)) * (np.arange(batch)[:, None] > 0)
        keep = steps >= pad if inputs.mask == "left" else steps < length - pad
        arguments["attention_mask"] = keep.astype(np.int64)

    if inputs.labels is not None:
        labels = rng.integers(0, config["vocab_size"], shape) if inputs.embeds else tokens.copy()
        if inputs.labels in ("some", "one_row_empty"):
            labels[rng.random(shape) < 0.4] = IGNORE
        if inputs.labels == "one_row_empty":
            labels[0] = IGNORE
        if inputs.labels == "none":
            labels[:] = IGNORE
        arguments["labels"] = labels
    if inputs.num_items is not None:
        arguments["num_items_in_batch"] = inputs.num_items
    if inputs.keep:
        arguments["logits_to_keep"] = (
            np.sort(rng.choice(length, size=3, replace=False))
            if inputs.keep == "index"
            else inputs.keep
        )
    return arguments


def torch_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with torch tensors."""
    return {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in inputs.items()
    }


def hf_config(config: Config) -> HFConfig:
    return HFConfig.from_dict(dict(config))


def weights_of(
    config: Config, seed: int = 0, model_class: type[PreTrainedModel] = HFLlama
) -> dict[str, torch.Tensor]:
    """Random float32 weights by Hugging Face's names; no `lm_head.weight` if it is tied.

    Names and shapes are those of Hugging Face's own model. Matrices have a standard deviation of
    1/sqrt(fan_in), norm weights are 1 +- 0.3, biases +- 0.3.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_class(hf_config(config)).named_parameters()}
    rng = np.random.default_rng([seed, 0])
    weights = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif name.endswith(".bias"):
            values = 0.3 * values
        else:
            values = values / np.sqrt(shape[-1])
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


# Hugging Face's model ----------------------------------------------------------------------------


def hf_model(
    config: Config,
    weights: Mapping[str, torch.Tensor],
    attention: str = "sdpa",
    model_class: type[PreTrainedModel] = HFLlama,
) -> Any:
    """Hugging Face's float32 model with these weights, in evaluation mode."""
    hf = hf_config(config)
    hf._attn_implementation = attention
    model = model_class(hf).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing or (missing == ["lm_head.weight"] and config["tie_word_embeddings"])
    return model


def hf_inputs(inputs: Mapping[str, Any], attention: str = "sdpa") -> dict[str, Any]:
    """The arguments that Hugging Face's model takes: segments become part of a 4-d mask."""
    tensors = torch_inputs(inputs)
    segments = tensors.pop("segment_ids", None)
    if segments is not None:
        length = segments.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
        if "attention_mask" in tensors:
            visible = visible & tensors["attention_mask"].bool()[:, None, None, :]
        if attention == "eager":
            lowest = torch.finfo(torch.float32).min
            visible = torch.zeros(visible.shape).masked_fill(~visible, lowest)
        tensors["attention_mask"] = visible
    elif "position_ids" in tensors and "attention_mask" not in tensors:
        # Without a mask Hugging Face takes jumps in the positions for packed documents.
        tensors["attention_mask"] = torch.ones_like(tensors["position_ids"])
    return tensors


def write_hf_directory(
    path: Path, config: Config, weights: Mapping[str, torch.Tensor], **save: Any
) -> Path:
    """Write a Hugging Face directory by `save_pretrained`, but with `config` itself as config.json:
    transformers writes every config in the layout of its own version."""
    hf_model(config, weights).save_pretrained(path, **save)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def blind_rows(inputs: Mapping[str, Any]) -> np.ndarray | bool:
    """The queries that see no key at all, bool [B, T]; False without a mask.

    For these, Hugging Face's eager attention returns the mean of all values, its sdpa zero.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return False
    batch, length = mask.shape
    visible = np.broadcast_to(np.tri(length, dtype=bool), (batch, length, length))
    visible = visible & mask.astype(bool)[:, None, :]
    if "segment_ids" in inputs:
        segments = inputs["segment_ids"]
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    return ~visible.any(-1)
