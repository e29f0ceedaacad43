"""LitGPT's checkpoints, made by rules written out here, as its own converter has them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import convert
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.convert.test_damage import flip, truncate

Tensors = dict[str, torch.Tensor]
NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def litgpt_tensors(model: Any, *, by_group: bool) -> Tensors:
    """A model's weights as LitGPT has them, today or before its projections were reordered."""
    config, state = model.config, model.state_dict()
    result = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(("q_proj", "k_proj", "v_proj")):
            continue
        if ".layers." not in module:
            result[f"{NAMES[module]}.{kind}"] = tensor
            continue
        _, _, layer, inner = module.split(".", 3)
        result[f"transformer.h.{layer}.{NAMES[inner]}.{kind}"] = tensor
    groups = config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            prefix = f"model.layers.{layer}.self_attn"
            q, k, v = (state[f"{prefix}.{each}_proj.{kind}"] for each in "qkv")
            if by_group:
                parts = zip(*(each.chunk(groups) for each in (q, k, v)), strict=True)
                fused = torch.cat([torch.cat(part) for part in parts])
                result[f"transformer.h.{layer}.attn.attn.{kind}"] = fused
            else:
                result[f"transformer.h.{layer}.attn.qkv.{kind}"] = torch.cat((q, k, v))
    return result


def litgpt_config(model: Any, **changed: Any) -> dict[str, Any]:
    """The fields of LitGPT's Config that a Llama sets; the others have their defaults."""
    config = model.config
    rope = config.rope_parameters
    adjusted = None
    if rope["rope_type"] == "llama3":
        adjusted = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        adjusted["original_max_seq_len"] = rope["original_max_position_embeddings"]
    return {
        "name": "tiny",
        "hf_config": {"org": "a", "name": "b"},
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads,
        "n_embd": config.hidden_size,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "norm_class_name": "RMSNorm",
        "norm_eps": config.rms_norm_eps,
        "mlp_class_name": "LLaMAMLP",
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": config.attention_bias,
        "rope_base": int(rope["rope_theta"]),
        "rope_condense_ratio": 1,
        "rope_adjustments": adjusted,
        "n_expert": 0,
        "sliding_window_size": None,
    } | changed


def write(directory: Path, tensors: Any, fields: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(tensors, directory / "lit_model.pth")
    (directory / "model_config.yaml").write_text(yaml.safe_dump(fields))
    return directory


def expected(model: Any) -> Tensors:
    tied = model.config.tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_every_tensor_bit_for_bit(
    tmp_path: Path, by_group: bool, kv_heads: int, biased: bool
) -> None:
    model = tiny_model(
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16 if biased else 8,
        tie_word_embeddings=kv_heads == 2,
        attention_bias=biased,
        mlp_bias=biased,
        rope_parameters=LLAMA3 if biased else {"rope_type": "default", "rope_theta": 10000.0},
    ).to(torch.bfloat16)
    tensors: Any = litgpt_tensors(model, by_group=by_group)
    if biased:  # of a training run
        tensors = {"model": tensors, "optimizer": {"state": {}}, "iter_num": 3}
    source = write(tmp_path / "lit", tensors, litgpt_config(model))
    out = convert.convert(source, tmp_path / "out")
    assert same(load_file(out / "model.safetensors"), expected(model)) == []
    config = convert.info(out)["config"]
    assert config["tie_word_embeddings"] == model.config.tie_word_embeddings
    assert config["rope_parameters"] == model.config.rope_parameters


@pytest.mark.parametrize("prefix", ["", "_"])
def test_the_config_of_early_versions(tmp_path: Path, prefix: str) -> None:
    """lit_config.json, with `_norm_class` and `_mlp_class` at first."""
    model = tiny_model(tie_word_embeddings=False)
    fields = litgpt_config(model)
    for name in ("norm_class", "mlp_class"):
        fields[f"_{name}" if prefix else f"{name}_name"] = fields.pop(f"{name}_name")
    source = write(tmp_path / "lit", litgpt_tensors(model, by_group=True), {})
    (source / "model_config.yaml").unlink()
    (source / "lit_config.json").write_text(json.dumps(fields))
    out = convert.convert(source, tmp_path / "out")
    assert same(load_file(out / "model.safetensors"), expected(model)) == []
    (source / "lit_config.json").write_text(json.dumps(fields | {"n_expert": 8}))
    with pytest.raises(ValueError, match=r"lit_config.json: n_expert: found 8"):
        convert.convert(source, tmp_path / "refused")


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_what_is_written(tmp_path: Path, kv_heads: int) -> None:
    model = tiny_model(num_attention_heads=4, num_key_value_heads=kv_heads, rope_parameters=LLAMA3)
    model.save_pretrained(tmp_path / "model")
    out = convert.convert(tmp_path / "model", tmp_path / "out", to="litgpt")
    written = torch.load(out / "lit_model.pth", weights_only=True)
    assert same(written, litgpt_tensors(model, by_group=False)) == []
    fields = yaml.safe_load((out / "model_config.yaml").read_text())
    wanted = litgpt_config(model)
    assert {key: wanted[key] for key in fields if key in wanted} | {
        "name": "",
        "hf_config": {},
    } == {key: fields[key] for key in fields if key in wanted} | {"name": "", "hf_config": {}}


def test_padded_vocabulary(tmp_path: Path) -> None:
    """Rows beyond config.json's vocabulary are left out; without one they are kept."""
    model = tiny_model(tie_word_embeddings=False)
    tensors = litgpt_tensors(model, by_group=False)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.ones(7, tensors[name].shape[1])))
    rows = model.config.vocab_size + 7
    source = write(tmp_path / "lit", tensors, litgpt_config(model, padded_vocab_size=rows))
    kept = load_file(convert.convert(source, tmp_path / "kept") / "model.safetensors")
    assert torch.equal(kept["lm_head.weight"], tensors["lm_head.weight"])
    model.config.save_pretrained(source)
    cut = load_file(convert.convert(source, tmp_path / "cut") / "model.safetensors")
    assert same(cut, expected(model)) == []
    assert any("7 rows of padding" in note for note in convert.info(source)["notes"])


def test_refusals(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=False)
    tensors, fields = litgpt_tensors(model, by_group=False), litgpt_config(model)

    def error(tensors: Tensors, **changed: Any) -> str:
        write(tmp_path / "lit", tensors, fields | changed)
        with pytest.raises(ValueError) as caught:
            convert.convert(tmp_path / "lit", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "lit") in str(caught.value)
        return str(caught.value)

    for key, value in {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GemmaMLP",
        "rotary_percentage": 0.25,
        "parallel_residual": True,
        "norm_qk": True,
        "n_expert": 8,
        "sliding_window_size": 64,
        "rope_interleave": True,
        "lm_head_bias": True,
        "attn_bias": True,
        "n_embd": "wide",
        "norm_eps": -1,
        "rope_base": None,
        "rope_adjustments": {"factor": 2.0, "beta_fast": 32},
    }.items():
        assert f"{key}: found" in error(tensors, **{key: value}), key
    less = {k: v for k, v in tensors.items() if k != "transformer.h.1.attn.qkv.weight"}
    assert "transformer.h.1.attn.qkv.weight: missing" in error(less)
    wrong = tensors | {"transformer.h.1.attn.qkv.weight": torch.zeros(3, 3)}
    assert "transformer.h.1.attn.qkv.weight: found shape [3, 3], expected" in error(wrong)
    assert "transformer.h.0.norm_3.weight: unexpected" in error(
        tensors | {"transformer.h.0.norm_3.weight": torch.zeros(3)}
    )
    other = tiny_model(tie_word_embeddings=False, num_attention_heads=2, num_key_value_heads=2)
    other.config.save_pretrained(tmp_path / "lit")
    assert "model_config.yaml and config.json differ: num_attention_heads" in error(tensors)
    (tmp_path / "lit/model_config.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"model_config\.yaml: found a list"):
        convert.convert(tmp_path / "lit", tmp_path / "out")
    (tmp_path / "lit/model_config.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match=r"model_config\.yaml: not valid YAML"):
        convert.convert(tmp_path / "lit", tmp_path / "out")
    (tmp_path / "lit/model_config.yaml").unlink()
    with pytest.raises(ValueError, match=r"model_config\.yaml: cannot be read"):
        convert.convert(tmp_path / "lit", tmp_path / "out")


def test_models_that_it_cannot_hold(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="LitGPT cannot hold this model: mlp_bias True"):
        convert.plan(tmp_path / "model", tmp_path / "out", to="litgpt")


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damage_of_the_weights(
    tmp_path: Path, damage: Callable[[Path, random.Random], str]
) -> None:
    """Numbers have checksums, so that no flip is passed on."""
    model = tiny_model()
    source = write(tmp_path / "lit", litgpt_tensors(model, by_group=True), litgpt_config(model))
    file = source / "lit_model.pth"
    content, rng, errors = file.read_bytes(), random.Random(0), 0
    for case in range(50):
        file.write_bytes(content)
        what = damage(file, rng)
        out = tmp_path / f"out{case}"
        try:
            convert.convert(source, out, verify=False)
        except ValueError as error:
            errors += 1
            assert str(source) in str(error), what
            assert not out.exists()
        else:
            assert same(load_file(out / "model.safetensors"), expected(model)) == [], what
    assert errors > 25
