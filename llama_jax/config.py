"""LlamaConfig: every field of a Hugging Face Llama `config.json`, read from and written to both layouts.

transformers v4 has rotary embeddings as `rope_theta` + `rope_scaling` (with `type` or `rope_type`), v5 as
one dictionary `rope_parameters`. Here there is only `rope_parameters`; both layouts are read and written,
and a file in which they contradict each other is an error, because the two versions of transformers would
run two different models.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.files.foreign_weights import (
    describe,
    foreign_quantization,
    quantization_refusal,
    without_quantization,
)
from llama_jax.files.json_object import read_json_object
from llama_jax.files.paths import source_path
from llama_jax.numerics.activations import ACTIVATIONS
from llama_jax.numerics.rope import (
    longrope_attention_factor,
    unknown_constants,
    validate_rope_parameters,
)
from llama_jax.numerics.scalars import is_integer, is_number, plain_numbers

_ARCHITECTURES = ["LlamaForCausalLM"]
_TRAINED_CONTEXT_TYPES = ("llama3", "yarn", "longrope")  # of original_max_position_embeddings
_DEFAULT_LABELS = 2  # for this many, transformers writes no label names
# Marks a `quantization_config` of this library. There is deliberately no `quant_method`: without one,
# transformers refuses to load the directory; an unknown one is only a warning, and random weights.
QUANTIZED_BY = {"quantized_by": "llama_jax"}
_QUANTIZED_BY_OLD = {"quant_method": "llama_jax"}
_MAX_MESSAGE = 600
DEFAULT_ROPE_THETA = 10000.0  # transformers' own default for Llama when no theta is given

# Fields that change what transformers' Llama computes and are not implemented here, with the values that do
# not change it.
_UNIMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "per_layer_config": (None, {}),
    "token_classification_bias": (True,),
}
# Fields of other architectures, which transformers' Llama ignores and so do we, with their neutral
# values. A file with another value may be meant for another program.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "alibi": (None, False),
    "attention_chunk_size": (None, 0),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0),
    "attn_temperature_tuning": (None, False),
    "clip_qkv": (None, 0),
    "embd_pdrop": (None, 0),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None, 0),
    "hidden_dropout": (None, 0),
    "kv_lora_rank": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "parallel_attn": (None, False),
    "pruned_heads": (None, {}),
    "q_lora_rank": (None, 0),
    "qk_layernorm": (None, False),
    "qk_norm": (None, False),
    "query_pre_attn_scalar": (None,),
    "resid_pdrop": (None, 0),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "scale_depth": (None,),
    "scale_emb": (None, 1),
    "sliding_window": (None, 0),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
    "use_sliding_window": (None, False),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a Llama.

    Fields, names and defaults are those of `transformers.LlamaConfig`. `num_key_value_heads` and
    `head_dim` are filled in if None. `rope_parameters` holds `rope_type`, `rope_theta` and the parameters
    of that type. `num_labels`, `id2label` and `label2id` are filled in from one another; they,
    `problem_type` and `classifier_dropout` are for the classification heads. `extra_fields` are fields of
    the file that do not change the mathematics (`torch_dtype`, `architectures`, ...); they are written
    back.

    Raises:
        ValueError: a field of the wrong type or out of range.

    Examples:
        >>> from llama_jax import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2,
        ... )
        >>> config.head_dim, config.rope_parameters
        (16, {'rope_type': 'default', 'rope_theta': 10000.0})
        >>> LlamaConfig.from_dict(config.to_dict()) == config
        True
        >>> LlamaConfig(num_attention_heads=3)
        Traceback (most recent call last):
        ValueError: hidden_size: found 4096, expected a multiple of num_attention_heads=3 (or a head_dim)
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | tuple[int, ...] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    # dictionaries have no hash; two configs that differ only there still compare unequal
    rope_parameters: Mapping[str, Any] | None = field(default=None, hash=False)
    attention_bias: bool = False
    attention_dropout: float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = field(default=None, hash=False)
    label2id: Mapping[str, int] | None = field(default=None, hash=False)
    problem_type: str | None = None
    classifier_dropout: float | None = None
    extra_fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # the dataclass is frozen from here on

        for declared in dataclasses.fields(self):
            fill(declared.name, plain_numbers(getattr(self, declared.name)))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
            _require_positive_int(name, getattr(self, name))
        _require_positive_int("max_position_embeddings", self.max_position_embeddings)
        _require_positive_int("num_hidden_layers", self.num_hidden_layers, 100_000)
        if self.num_key_value_heads is None:
            fill("num_key_value_heads", self.num_attention_heads)
        _require_positive_int("num_key_value_heads", self.num_key_value_heads)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads: found {self.num_key_value_heads}, expected a divisor of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: found {self.hidden_size}, expected a multiple of "
                    f"num_attention_heads={self.num_attention_heads} (or a head_dim)"
                )
            fill("head_dim", self.hidden_size // self.num_attention_heads)
        _require_positive_int("head_dim", self.head_dim)
        if self.head_size % 2:
            raise ValueError(f"head_dim: found {self.head_dim}, expected an even number")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: found {self.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        for name in ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected true or false")
        fill("attention_dropout", self.attention_dropout or 0.0)
        fractions = ["rms_norm_eps", "initializer_range", "attention_dropout"]
        if self.classifier_dropout is not None:
            fractions.append("classifier_dropout")
        for name in fractions:
            _require_number(name, getattr(self, name), 0.0, 1.0)
            fill(name, float(getattr(self, name)))  # a file may have 0 for 0.0
        fill("pretraining_tp", 1 if self.pretraining_tp is None else self.pretraining_tp)
        _require_positive_int("pretraining_tp", self.pretraining_tp)
        for name in ("pad_token_id", "bos_token_id"):
            require_tokens(name, getattr(self, name), several=False)
        require_tokens("eos_token_id", self.eos_token_id, several=True)
        if isinstance(self.eos_token_id, list):
            fill("eos_token_id", tuple(self.eos_token_id))
        for name, value in _merge_labels(self.num_labels, self.id2label, self.label2id).items():
            fill(name, value)
        # the loss, which alone uses it, checks the name
        if not isinstance(self.problem_type, str | None):
            raise ValueError(f"problem_type: found {self.problem_type!r}, expected a name or null")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type: found 'single_label_classification' of 1 label, expected 2"
            )
        rope = {n: plain_numbers(value) for n, value in (self.rope_parameters or {}).items()}
        rope.setdefault("rope_type", "default")
        rope.setdefault("rope_theta", DEFAULT_ROPE_THETA)
        if rope["rope_type"] in _TRAINED_CONTEXT_TYPES:
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        validate_rope_parameters(rope, self.head_size, self.max_position_embeddings)
        if rope["rope_type"] == "yarn" and "factor" not in rope:
            # transformers requires the key, and computes this if it is null
            context = rope["original_max_position_embeddings"]
            rope["factor"] = self.max_position_embeddings / context
        if rope["rope_type"] == "longrope" and "factor" in rope:
            # transformers 4 would derive it from max_position_embeddings instead
            rope["attention_factor"] = longrope_attention_factor(rope, self.max_position_embeddings)
        fill("rope_parameters", rope)
        fill("extra_fields", dict(self.extra_fields))
        _refuse_unimplemented(self.extra_fields)

    @property
    def ignored(self) -> dict[str, Any]:
        """Fields that may matter to other programs but are ignored by transformers' Llama and here."""
        fields = self.extra_fields
        if not fields.get("use_sliding_window", True):
            fields = {name: value for name, value in fields.items() if name != "sliding_window"}
        ignored = {
            name: fields[name]
            for name, neutral in _IGNORED.items()
            if name in fields and fields[name] not in neutral
        }
        constants = unknown_constants(self.rope).items()
        return ignored | {f"rope_parameters.{name}": value for name, value in constants}

    @property
    def head_size(self) -> int:
        """`head_dim`, which is never None once constructed."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def kv_heads(self) -> int:
        """`num_key_value_heads`, which is never None once constructed."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def label_count(self) -> int:
        """`num_labels`, which is never None once constructed."""
        assert self.num_labels is not None
        return self.num_labels

    @property
    def rope(self) -> Mapping[str, Any]:
        """`rope_parameters`, which is never None once constructed."""
        assert self.rope_parameters is not None
        return self.rope_parameters

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple: empty, one id or several."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """The config of a parsed `config.json` in either layout.

        Raises:
            ValueError: another architecture, contradictory rope layouts, a field that changes the
                mathematics and is not implemented, or a value out of range.
        """
        fields = dict(fields)
        _require_llama(fields)
        names = {f.name for f in dataclasses.fields(cls)} - {"rope_parameters", "extra_fields"}
        rope = _merge_rope_layouts(fields)
        known = {name: fields.pop(name) for name in names & fields.keys()}
        fields.pop("model_type", None)
        if our_quantization(fields) is not None:
            del fields["quantization_config"]  # see `quantization.model.read_quantization`
        fields = without_quantization(fields)  # see `checkpoints.quantized`
        if fields.get("architectures") == _ARCHITECTURES:
            del fields["architectures"]
        return cls(**known, rope_parameters=rope, extra_fields=fields)

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`, with both rope layouts for both versions of transformers."""
        fields: dict[str, Any] = {"architectures": list(_ARCHITECTURES), "model_type": "llama"}
        fields |= self.extra_fields
        omitted = {"rope_parameters", "extra_fields", "num_labels"}
        if self.id2label == _label_names(_DEFAULT_LABELS):
            omitted |= {"id2label", "label2id"}
        omitted |= {n for n in ("problem_type", "classifier_dropout") if getattr(self, n) is None}
        for f in dataclasses.fields(self):
            if f.name not in omitted:
                fields[f.name] = getattr(self, f.name)
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        rope = dict(self.rope)
        if rope["rope_type"] == "longrope":
            # transformers 4 reads the trained context from outside the dictionary
            fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        fields["rope_parameters"] = rope
        fields["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        fields["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
        return fields

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> "LlamaConfig":
        """Read `directory/config.json`, with `changes` to its fields.

        Args:
            directory: of a Hugging Face checkpoint, or its name on the Hub.
            changes: fields to override. A new `num_labels` drops the label names; a field of rope replaces
                both layouts of it.

        Raises:
            TypeError: a keyword that is not a field.
            ValueError: no such directory or file, invalid JSON, or as `from_dict`.
        """
        unknown = changes.keys() - _CHANGEABLE
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))}: unknown keyword; expected fields of LlamaConfig"
            )
        path = source_path(directory, weights=False) / "config.json"
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent}: {describe(path.parent)}")
        if not path.exists():
            raise ValueError(f"{path}: not found; {path.parent} is {describe(path.parent)}")
        fields = read_json_object(path)
        if "num_labels" in changes:
            fields = {n: v for n, v in fields.items() if n not in ("id2label", "label2id")}
        try:
            if _ROPE & changes.keys():
                fields = _with_rope(fields, changes)
            return cls.from_dict(fields | changes)
        except ValueError as error:
            message = str(error)
            if len(message) > _MAX_MESSAGE:  # it may show a value of any size
                message = f"{message[:_MAX_MESSAGE]}..."
            raise ValueError(f"{path}: {message}") from None


_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
_CHANGEABLE = {declared.name for declared in dataclasses.fields(LlamaConfig)} - {
    "extra_fields"
} | _ROPE


def _with_rope(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` without the rope parameters that `changes` replace: all of them, or the theta alone."""
    fields = dict(fields)
    rope = _merge_rope_layouts(fields)
    theta = rope.pop("rope_theta", None)
    if not {"rope_scaling", "rope_parameters"} & changes.keys():
        return fields | {"rope_scaling": rope}
    named = [changes.get(layout) for layout in ("rope_scaling", "rope_parameters")]
    if theta is None or any(isinstance(rope, Mapping) and "rope_theta" in rope for rope in named):
        return fields
    return fields | {"rope_theta": theta}


def _require_positive_int(name: str, value: Any, maximum: int = 2**31 - 1) -> None:
    if not is_integer(value) or not 1 <= value <= maximum:
        raise ValueError(f"{name}: found {value!r}, expected a positive integer up to {maximum}")


def _require_number(name: str, value: Any, low: float, high: float) -> None:
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name}: found {value!r}, expected a number from {low} to {high}")


def require_tokens(name: str, value: Any, *, several: bool) -> None:
    """Raise ValueError unless `value` is a token id, null or, where `several`, a list of ids."""
    listed = several and isinstance(value, list | tuple)
    for token in value if listed else () if value is None else (value,):
        if type(token) is not int or not -(2**31) <= token < 2**31:
            expected = "an integer, a list of integers or null" if several else "an integer or null"
            raise ValueError(f"{name}: found {token!r}, expected {expected}")


def _label_names(count: int) -> dict[int, str]:
    return {label: f"LABEL_{label}" for label in range(count)}


def _merge_labels(num_labels: Any, id2label: Any, label2id: Any) -> dict[str, Any]:
    """The number of labels and the mappings both ways, filled in from one another."""
    if num_labels is not None and (not is_integer(num_labels) or not 0 <= num_labels <= 2**20):
        raise ValueError(f"num_labels: found {num_labels!r}, expected a number up to {2**20}")
    if id2label is None:
        label2id = None  # as in transformers: the names follow from the numbers
        id2label = _label_names(_DEFAULT_LABELS if num_labels is None else num_labels)
    try:
        id2label = {int(label): name for label, name in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"id2label: found {id2label!r}, expected names by number") from None
    for name in id2label.values():
        if not isinstance(name, str):
            raise ValueError(f"id2label: found {name!r}, expected a name")
    if not isinstance(label2id, Mapping | None):
        raise ValueError(f"label2id: found {label2id!r}, expected numbers by name")
    if num_labels not in (None, len(id2label)):  # as in transformers: the number is what counts
        id2label, label2id = _label_names(num_labels), None
    if label2id is None:
        label2id = {name: label for label, name in id2label.items()}
    return {"num_labels": len(id2label), "id2label": id2label, "label2id": dict(label2id)}


def _require_llama(fields: Mapping[str, Any]) -> None:
    model_type = fields.get("model_type")
    architectures = fields.get("architectures") or []
    if model_type is None and not isinstance(architectures, list):
        raise ValueError(f"architectures: found {architectures!r}, expected a list")
    if model_type is None and any(not str(name).startswith("Llama") for name in architectures):
        raise ValueError(f"architectures: found {architectures}, expected a Llama")
    if model_type not in (None, "llama"):
        raise ValueError(f"model_type: found {model_type!r}, expected 'llama'")


def our_quantization(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config` of a parsed config.json if this library wrote it, else None."""
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    marks = (QUANTIZED_BY, _QUANTIZED_BY_OLD)
    strings = {name: value for name, value in quantization.items() if isinstance(value, str)}
    return quantization if any(mark.items() <= strings.items() for mark in marks) else None


def _refuse_unimplemented(fields: Mapping[str, Any]) -> None:
    if foreign := foreign_quantization(fields):
        raise ValueError(
            quantization_refusal(fields) or f"{foreign.key}: found {foreign.title}, expected none"
        )
    for name, neutral in _UNIMPLEMENTED.items():
        if name in fields and fields[name] not in neutral:
            raise ValueError(
                f"{name}: found {fields[name]!r}, which changes the mathematics and is not "
                f"implemented; expected it absent or {neutral[-1]!r}"
            )
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"layer_types: found {layer_types}, expected only 'full_attention'")


def _merge_rope_layouts(fields: dict[str, Any]) -> dict[str, Any]:
    """Take both layouts of the rotary embedding out of `fields` and return the parameters."""
    layouts: dict[str, dict[str, Any]] = {}
    for layout in ("rope_scaling", "rope_parameters"):
        value = fields.pop(layout, None)
        if not value:  # null and {}; transformers treats 0, false and [] the same
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{layout}: found {value!r}, expected an object or null")
        rope = {name: entry for name, entry in value.items() if entry is not None}
        legacy_type = rope.pop("type", None)
        rope.setdefault("rope_type", legacy_type or "default")
        layouts[layout] = rope
    has_theta = "rope_theta" in fields
    theta = fields.pop("rope_theta", None)
    thetas = {name: rope["rope_theta"] for name, rope in layouts.items() if "rope_theta" in rope}
    if theta is not None:
        thetas["rope_theta"] = theta
    if has_theta and not thetas:
        raise ValueError("rope_theta: found null, expected a positive number")
    if any(value != next(iter(thetas.values())) for value in thetas.values()):
        raise ValueError(
            f"rope_theta: found contradicting values {thetas}; transformers v4 and v5 would run "
            "different models, expected one value"
        )
    candidates = [
        {name: entry for name, entry in rope.items() if name != "rope_theta"}
        for rope in layouts.values()
    ]
    if len(candidates) == 2 and candidates[0] != candidates[1]:
        raise ValueError(
            f"rope_scaling: found {candidates[0]} and rope_parameters {candidates[1]}; "
            "transformers v4 and v5 would run different models, expected them to agree"
        )
    rope = candidates[0] if candidates else {"rope_type": "default"}
    if thetas:
        rope["rope_theta"] = next(iter(thetas.values()))
    # Phi-3 style files have two rope parameters outside the dictionary; transformers reads them, too.
    for name in ("original_max_position_embeddings", "partial_rotary_factor"):
        outside = fields.get(name)
        if outside is None:
            continue
        if name != "partial_rotary_factor" and rope["rope_type"] not in _TRAINED_CONTEXT_TYPES:
            continue
        if rope.setdefault(name, outside) != outside:
            raise ValueError(
                f"{name}: found {outside} and {rope[name]} in the rope parameters, expected one value"
            )
    if rope["rope_type"] == "longrope":
        fields.pop(
            "original_max_position_embeddings", None
        )  # written back from the rope parameters
    return rope
