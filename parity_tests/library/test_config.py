"""LlamaConfig reads both layouts of config.json, writes both, and refuses what it cannot compute."""

import json
from typing import Any

import numpy as np
import pytest
import transformers

from llama_jax import PRESETS, LlamaConfig
from llama_jax.inspection.architecture import parameter_count
from llama_jax.numerics.rope import inverse_frequencies

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16, "truncate": False}
LONG = {
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}
# (rope_type, its constants)
ROPES = [
    ("default", {}),
    ("linear", {"factor": 2.0}),
    ("dynamic", {"factor": 2.0}),
    ("yarn", YARN),
    ("longrope", LONG),
    ("llama3", LLAMA3),
]


def v4(rope_type: str, constants: dict[str, Any], type_key: str = "rope_type") -> dict[str, Any]:
    scaling = None if rope_type == "default" else {type_key: rope_type, **constants}
    return {"rope_theta": 500000.0, "rope_scaling": scaling}


def v5(rope_type: str, constants: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500000.0, **constants}}


@pytest.mark.parametrize(("rope_type", "constants"), ROPES, ids=[name for name, _ in ROPES])
def test_both_layouts_of_transformers_give_one_config(rope_type, constants):
    configs = {
        LlamaConfig.from_dict(BASE | layout)
        for layout in (
            v4(rope_type, constants),
            v4(rope_type, constants, "type"),
            v5(rope_type, constants),
            v4(rope_type, constants) | v5(rope_type, constants),
        )
    }
    assert len(configs) == 1
    (config,) = configs
    assert config.rope == {"rope_type": rope_type, "rope_theta": 500000.0, **constants}


@pytest.mark.parametrize(("rope_type", "constants"), ROPES, ids=[name for name, _ in ROPES])
def test_a_written_config_reads_back_and_transformers_agrees(rope_type, constants):
    config = LlamaConfig.from_dict(BASE | v4(rope_type, constants))
    written = json.loads(json.dumps(config.to_dict()))
    assert LlamaConfig.from_dict(written) == config
    theirs = transformers.LlamaConfig.from_dict(dict(written))
    assert theirs.rope_parameters == config.rope
    for name in set(BASE) - {"model_type"}:
        assert getattr(theirs, name) == BASE[name]
    # what the other major reads: the v4 fields alone, and the v5 field alone
    old = {name: value for name, value in written.items() if name != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new) == config


def test_every_field_and_unknown_metadata_survive_the_round_trip():
    fields = BASE | {
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.03,
        "use_cache": False,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pretraining_tp": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "mlp_bias": True,
        "head_dim": 16,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "some_future_metadata": {"a": [1, None, "b"]},
    }
    written = LlamaConfig.from_dict(fields).to_dict()
    assert {name: written[name] for name in fields} == fields


def test_defaults_are_those_of_transformers():
    ours, theirs = LlamaConfig.from_dict({"model_type": "llama"}), transformers.LlamaConfig()
    for name in LlamaConfig.__dataclass_fields__.keys() - {"extra_fields"}:
        # transformers looks for some fields that its own config need not have
        assert getattr(ours, name) == getattr(theirs, name, None), name


def test_rope_parameters_outside_the_dictionary_are_used():
    scaling = {"rope_type": "yarn", "factor": 4.0}
    fields = BASE | {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    assert LlamaConfig.from_dict(fields).rope["original_max_position_embeddings"] == 16
    # absent everywhere, transformers takes the whole context
    fields = BASE | {"rope_scaling": scaling}
    assert LlamaConfig.from_dict(fields).rope["original_max_position_embeddings"] == 64


def test_a_null_theta_beside_a_complete_dictionary_is_no_contradiction():
    fields = BASE | {"rope_theta": None, "rope_parameters": {"rope_theta": 3e4}, "rope_scaling": {}}
    assert LlamaConfig.from_dict(fields).rope == {"rope_type": "default", "rope_theta": 3e4}


OTHERS = [
    # of YaRN's and NTK's first code, and of Qwen2-VL
    {"rope_type": "yarn", "factor": 4.0, "attn_factor": 1, "extrapolation_factor": 1},
    {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 1, 1]},
    {"rope_type": "dynamic", "factor": 2.0, "alpha": "1000"},
    {"rope_type": "default", "note": {"a": None}, "name": "x"},
]


@pytest.mark.parametrize("scaling", OTHERS, ids=lambda scaling: scaling["rope_type"])
def test_unknown_rope_parameters_are_ignored_and_listed(scaling):
    theirs = transformers.LlamaConfig.from_dict(BASE | {"rope_scaling": dict(scaling)})
    config = LlamaConfig.from_dict(BASE | {"rope_scaling": scaling})
    unknown = scaling.keys() - {"rope_type", "factor"}
    assert config.ignored == {f"rope_parameters.{name}": scaling[name] for name in sorted(unknown)}
    # kept for those who do know them
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plain = LlamaConfig.from_dict(
        BASE | {"rope_scaling": {n: scaling[n] for n in scaling.keys() - unknown}}
    )
    for length in (8, 200):
        one, other = (
            inverse_frequencies(c.rope, c.head_size, c.max_position_embeddings, length)
            for c in (config, plain)
        )
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1] == other[1]
    assert {n: theirs.rope_parameters[n] for n in scaling} == {n: config.rope[n] for n in scaling}


@pytest.mark.parametrize("file", [v4("llama3", LLAMA3), v5("llama3", LLAMA3)], ids=["v4", "v5"])
@pytest.mark.parametrize("both", [False, True])
def test_overridden_rope_parameters_replace_those_of_the_file(tmp_path, file, both):
    """`transformers.LlamaConfig.from_pretrained(d, rope_parameters=...)` replaces all of them."""
    fields = LlamaConfig.from_dict(BASE | file).to_dict() if both else BASE | file
    (tmp_path / "config.json").write_text(json.dumps(fields))
    old = LlamaConfig.from_pretrained(tmp_path).rope
    assert LlamaConfig.from_pretrained(tmp_path, rope_theta=7e5).rope == old | {"rope_theta": 7e5}
    linear = {"rope_type": "linear", "factor": 2.0}
    for name in ("rope_scaling", "rope_parameters"):
        rope = LlamaConfig.from_pretrained(tmp_path, **{name: linear}).rope
        assert rope == linear | {"rope_theta": old["rope_theta"]}
        complete = linear | {"rope_theta": 3e4}
        assert LlamaConfig.from_pretrained(tmp_path, **{name: complete}).rope == complete
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path, rope_parameters=complete)
    assert theirs.rope_parameters == complete
    assert LlamaConfig.from_pretrained(tmp_path, rope_scaling=linear, rope_theta=9.0).rope == (
        linear | {"rope_theta": 9.0}
    )
    plain = LlamaConfig.from_pretrained(tmp_path, rope_scaling=None).rope
    assert plain == {"rope_type": "default", "rope_theta": old["rope_theta"]}


def test_an_unused_sliding_window_is_metadata():
    fields = BASE | {"sliding_window": 4096, "use_sliding_window": False}
    assert LlamaConfig.from_dict(fields).to_dict()["sliding_window"] == 4096


def test_a_config_made_here_reads_back_unchanged():
    config = LlamaConfig(pad_token_id=-1, eos_token_id=[1, 2])
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert LlamaConfig.from_dict({"model_type": None}).to_dict()["model_type"] == "llama"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral"}, "model_type: found 'mistral', expected 'llama'"),
    ({"model_type": None, "architectures": ["GPT2LMHeadModel"]}, "architectures: found"),
    ({"vocab_size": 0}, "vocab_size: found 0, expected a positive integer"),
    ({"vocab_size": "96"}, "vocab_size: found '96'"),
    ({"hidden_size": 32.0}, "hidden_size: found 32.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers: found True"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
    ({"hidden_size": 30}, "hidden_size: found 30, expected a multiple"),
    ({"head_dim": 7}, "head_dim: found 7, expected an even number"),
    ({"hidden_act": "xielu"}, "hidden_act: found 'xielu', expected one of silu"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: found '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: found nan"),
    ({"attention_dropout": 1.5}, "attention_dropout: found 1.5"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1, expected true or false"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id: found 'x'"),
    ({"bos_token_id": 1.0}, "bos_token_id: found 1.0"),
    ({"pretraining_tp": 0}, "pretraining_tp: found 0"),
    ({"is_causal": False}, "is_causal: found False, which changes the mathematics"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder: found True"),
    ({"quantization_config": 4}, "quantization_config: found 4, expected an object or null"),
    ({"id2label": {"0": []}}, "id2label: found [], expected a name"),
    ({"layer_types": ["sliding_attention"]}, "layer_types: found"),
    ({"rope_theta": None}, "rope_theta: found null"),
    ({"rope_theta": [1]}, "rope_parameters['rope_theta']: found [1]"),
    ({"rope_theta": 10**400}, "rope_parameters['rope_theta']: found"),
    ({"hidden_act": []}, "hidden_act: found []"),
    ({"layer_types": 5}, "layer_types: found 5"),
    ({"model_type": None, "architectures": 5}, "architectures: found 5"),
    ({"num_hidden_layers": 3_000_000_000}, "num_hidden_layers: found 3000000000"),
    ({"vocab_size": 1 << 40}, "vocab_size: found 1099511627776"),
    ({"eos_token_id": [None]}, "eos_token_id: found None"),
    ({"eos_token_id": 1 << 40}, "eos_token_id: found 1099511627776"),
    ({"rope_scaling": {"rope_type": []}}, "rope_type: found []"),
    ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", **YARN}}, "no finite frequencies"),
    (
        {"rope_scaling": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 1}},
        "no finite frequencies",
    ),
    ({"rope_theta": -1.0}, "rope_parameters['rope_theta']: found -1.0"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta: found contradict"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e4}},
        "rope_scaling: found",
    ),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type: found 'ntk', expected one of"),
    ({"rope_scaling": "linear"}, "rope_scaling: found 'linear', expected an object"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters['factor']: missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_parameters['factor']: found"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "rope_parameters['high_freq_factor']: missing",
    ),
    (
        {"rope_scaling": {"rope_type": "longrope", **LONG, "long_factor": [1.0]}},
        "rope_parameters['long_factor']: found 1 factors, expected head_dim / 2 = 4",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor: found 0.5, expected 1.0",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_fields_are_one_line_errors(change, message):
    with pytest.raises(ValueError) as caught:
        LlamaConfig.from_dict(BASE | change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "found a JSON list, expected an object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_config_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_pretrained(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        LlamaConfig.from_pretrained(tmp_path / "absent")


# the counts that the model cards state
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tiny-4m": 4_000_000,
    "small-56m": 55_976_448,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_parameter_counts(name):
    assert parameter_count(PRESETS[name]) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", ["rms_norm_eps", "initializer_range", "attention_dropout", "classifier_dropout"]
)
def test_whole_numbers_are_floats_where_fractions_are_meant(name: str) -> None:
    """JSON writers drop the point of 0.0."""
    assert type(getattr(LlamaConfig(**{name: 0}), name)) is float
