"""Meta's checkpoints in and out: every shard merged, and models that the format cannot hold refused."""

from __future__ import annotations

import json
import random
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from convert import convert, info
from convert.formats.meta import read
from convert.formats.meta.params import config_of, intermediate_size, params_of
from llama_jax.config import LlamaConfig
from llama_jax.presets import PRESETS
from parity_tests.convert.formats.gguf.tiny_gguf import same, tiny_model
from parity_tests.convert.formats.meta.tiny_meta import (
    Tensors,
    meta_logits,
    meta_params,
    meta_tensors,
    split_tensors,
    write_meta,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "vocab_size": 40,
}  # 8/3 x 32, up to 16's multiple
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny(heads: str = "GQA", **options: Any) -> LlamaForCausalLM:
    count, kv_heads = HEADS[heads]
    fields = {"num_attention_heads": count, "num_key_value_heads": kv_heads, **SHAPE}
    return tiny_model(**(fields | options))


def directory(
    path: Path, model: LlamaForCausalLM | None = None, count: int = 2, **extra: Any
) -> Path:
    model = model or tiny()
    shards = split_tensors(meta_tensors(model), count, kv_heads=model.config.num_key_value_heads)
    return write_meta(path, shards, meta_params(model, **extra))


def hf_directory(path: Path, model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(path)
    return path


def weights(model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> Tensors:
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def read_all(path: Path) -> dict[str, np.ndarray]:
    checkpoint = read(path)
    return {spec.name: checkpoint.load(spec.name) for spec in checkpoint.tensors}


def change(path: Path, shard: int, update: Any) -> Path:
    """Apply `update` to the tensors of one shard of a directory."""
    file = path / f"consolidated.{shard:02d}.pth"
    tensors = torch.load(file, weights_only=True)
    update(tensors)
    torch.save(tensors, file)
    return path


# --- there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("tied", [True, False])
def test_shards_into_hugging_face(
    tmp_path: Path, tied: bool, heads: str, count: int, embedding_axis: int
) -> None:
    model = tiny(heads, tie_word_embeddings=tied)
    dtype = [torch.float32, torch.bfloat16, torch.float16][(count + embedding_axis) % 3]
    kv_heads = HEADS[heads][1]
    shards = split_tensors(
        meta_tensors(model, dtype), count, kv_heads=kv_heads, embedding_axis=embedding_axis
    )
    source = write_meta(tmp_path / "in", shards, meta_params(model))
    out = convert(source, tmp_path / "out")
    assert same(load_file(out / "model.safetensors"), weights(model, dtype)) == []
    converted = LlamaConfig.from_pretrained(out)
    assert converted.tie_word_embeddings is tied
    assert (converted.kv_heads, converted.intermediate_size) == (kv_heads, 96)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_into_meta_and_back(
    tmp_path: Path, tied: bool, heads: str, dtype: torch.dtype
) -> None:
    model = tiny(heads, tie_word_embeddings=tied)
    source = hf_directory(tmp_path / "in", model, dtype)
    meta = convert(source, tmp_path / "meta", to="meta")
    for mapped in (True, False):
        converted = torch.load(meta / "consolidated.00.pth", weights_only=True, mmap=mapped)
        assert same(converted, meta_tensors(model, dtype)) == []
    back = convert(meta, tmp_path / "back")
    assert same(load_file(back / "model.safetensors"), weights(model, dtype)) == []
    ours, theirs = (LlamaConfig.from_pretrained(each) for each in (back, source))
    assert replace(ours, extra_fields={}) == replace(theirs, extra_fields={})


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, LLAMA3])
@pytest.mark.parametrize("heads", list(HEADS))
def test_metas_computation_gives_the_same_logits(
    tmp_path: Path, heads: str, rope: dict[str, Any]
) -> None:
    model = tiny(heads, rope_parameters=rope, max_position_embeddings=16384)
    ids = torch.randint(0, 40, (50,))
    meta = convert(hf_directory(tmp_path / "in", model), tmp_path / "meta", to="meta")
    params = json.loads((meta / "params.json").read_text())
    tensors = torch.load(meta / "consolidated.00.pth", weights_only=True)
    expected = model(ids[None]).logits[0].detach().double()
    converted = meta_logits(tensors, params, ids)
    assert (converted - expected).norm() < 1e-5 * expected.norm()


def test_every_storage_is_aligned_checked_and_shared(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    meta = convert(hf_directory(tmp_path / "in", model), tmp_path / "meta", to="meta")
    file = meta / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        data = [e for e in archive.infolist() if "/data/" in e.filename]
    assert len(data) == len(weights(model))  # the tied head takes no room
    content = file.read_bytes()
    for entry in data:
        start = entry.header_offset
        lengths = [int.from_bytes(content[start + i : start + i + 2], "little") for i in (26, 28)]
        assert (start + 30 + sum(lengths)) % 64 == 0
    converted = torch.load(file, weights_only=True)
    assert converted["output.weight"].data_ptr() == converted["tok_embeddings.weight"].data_ptr()


def test_a_file_that_needs_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beyond 4 GiB: sizes and offsets in zip64's fields."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    model = tiny()
    meta = convert(hf_directory(tmp_path / "in", model), tmp_path / "meta", to="meta")
    assert b"PK\x06\x06" in (meta / "consolidated.00.pth").read_bytes()
    for mapped in (True, False):
        converted = torch.load(meta / "consolidated.00.pth", weights_only=True, mmap=mapped)
        assert same(converted, meta_tensors(model)) == []


# --- params.json -------------------------------------------------------------------------------------

PUBLISHED = {
    "llama-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06,
                 "vocab_size": -1},
    "llama-2-70b": {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64,
                    "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
    "llama-3-8b": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
                   "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05,
                   "rope_theta": 500000.0},
    "llama-3.1-405b": {"dim": 16384, "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "n_heads": 128,
                       "n_kv_heads": 8, "n_layers": 126, "norm_eps": 1e-05, "rope_theta": 500000.0,
                       "use_scaled_rope": True, "vocab_size": 128256},
    "llama-3.2-1b": {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_heads": 32,
                     "n_kv_heads": 8, "n_layers": 16, "norm_eps": 1e-05, "rope_theta": 500000.0,
                     "use_scaled_rope": True, "vocab_size": 128256},
    "llama-3.2-3b": {"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24,
                     "n_kv_heads": 8, "n_layers": 28, "norm_eps": 1e-05, "rope_theta": 500000.0,
                     "use_scaled_rope": True, "vocab_size": 128256},
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_params(name: str) -> None:
    preset = PRESETS[name]
    tied = preset.tie_word_embeddings
    size = preset.vocab_size
    converted, notes = config_of(PUBLISHED[name], vocab_size=size, tied=tied, config_json=None)
    assert converted == preset
    assert any("max_position_embeddings" in note for note in notes)
    assert any("factor" in note for note in notes) is ("use_scaled_rope" in PUBLISHED[name])


@pytest.mark.parametrize("name", [name for name in PRESETS if "smollm" not in name])
def test_params_and_config_round_trip(name: str) -> None:
    preset = PRESETS[name]
    converted, notes = config_of(
        params_of(preset),
        vocab_size=preset.vocab_size,
        tied=preset.tie_word_embeddings,
        config_json=preset,
    )
    assert converted == preset
    assert notes == []


@settings(max_examples=500)
@given(st.integers(1, 20000), st.integers(1, 70000))
def test_any_width_of_the_feed_forward_layers(half: int, width: int) -> None:
    preset = LlamaConfig(hidden_size=2 * half, intermediate_size=width, num_attention_heads=1)
    assert intermediate_size(params_of(preset)) == width


def test_what_params_do_not_say_is_in_config_json(tmp_path: Path) -> None:
    """A factor other than 3.1's at another shape than 3.2's, and fields params.json has no key for."""
    rope = LLAMA3 | {"factor": 16.0}
    model = tiny(rope_parameters=rope, max_position_embeddings=4321, eos_token_id=[7, 9])
    meta = convert(hf_directory(tmp_path / "in", model), tmp_path / "meta", to="meta")
    config = LlamaConfig.from_dict(read(meta).config)
    assert (config.max_position_embeddings, config.eos_token_ids) == (4321, (7, 9))
    assert read(meta).notes == ()
    (meta / "config.json").unlink()
    bare = read(meta)
    assert bare.config["rope_parameters"]["factor"] == 16.0  # rope_scaling_factor says it
    assert any("max_position_embeddings" in note for note in bare.notes)


def test_a_contradicting_config_json(tmp_path: Path) -> None:
    meta = convert(hf_directory(tmp_path / "in", tiny()), tmp_path / "meta", to="meta")
    fields = json.loads((meta / "config.json").read_text())
    (meta / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.01}))
    assert "params.json and config.json differ: rms_norm_eps 1e-05, expected 0.01" in error_of(meta)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"dim": None}, "dim: found None, expected a positive integer"),
        ({"n_heads": 6}, "hidden_size: found 32, expected a multiple of num_attention_heads=6"),
        ({"n_kv_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ({"norm_eps": "x"}, "norm_eps: found x, expected a positive number"),
        ({"n_layers": True}, "n_layers: found True"),
        ({"n_layers": 99999}, "expected some for each of n_layers=99999"),
        ({"multiple_of": 10**400}, "multiple_of: found 1000"),
        ({"moe_args": {"num_experts": 16}}, "moe_args: found {'num_experts': 16}, which no Llama"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args: found"),
        ({"vision_chunk_size": 448}, "vision_chunk_size: found 448"),
        ({"vocab_size": 41}, "tok_embeddings.weight: found shape [20, 32], expected [41, 32] of 2"),
        ({"multiple_of": 1}, "layers.0.feed_forward.w1.weight: found shape [48, 32], expected [85, 32]"),
    ],
)  # fmt: skip
def test_wrong_params(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    assert message in error_of(directory(tmp_path / "in", **extra))


def test_params_with_missing_keys(tmp_path: Path) -> None:
    model = tiny("MHA")
    params = meta_params(model, vocab_size=-1, vision_chunk_size=-1, lora_args=None, max_seq_len=77)
    del params["n_kv_heads"], params["rope_theta"]
    for axis in (0, 1):
        shards = split_tensors(meta_tensors(model), 4, kv_heads=4, embedding_axis=axis)
        for shard in shards:
            shard["rope.freqs"] = torch.zeros(4)
        config = read(write_meta(tmp_path / f"in{axis}", shards, params)).config
        assert config["vocab_size"] == 40
        assert config["num_key_value_heads"] == 4
        assert config["max_position_embeddings"] == 77


# --- what the format cannot hold ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, "attention_bias True, expected False"),
        ({"mlp_bias": True}, "mlp_bias True, expected False"),
        ({"head_dim": 16}, "head_size 16, expected 8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 99}}, "embeddings': 99"),
    ],
)  # fmt: skip
def test_a_model_that_metas_format_cannot_hold(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    source = hf_directory(tmp_path / "in", tiny(**options))
    with pytest.raises(ValueError, match="Meta's format cannot hold this model: ") as caught:
        convert(source, tmp_path / "out", to="meta")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, meta = hf_directory(tmp_path / "in", tiny()), directory(tmp_path / "meta")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="torch is not installed"):
        convert(source, tmp_path / "out", to="meta")
    with pytest.raises(ValueError, match="torch is not installed"):
        read(meta)


# --- bad input ---------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    def update(tensors: Tensors) -> None:
        del tensors["norm.weight"]
        tensors["surplus"] = torch.zeros(3)
        tensors["layers.1.attention.wk.weight"] = torch.zeros(3, 32)
        tensors["layers.1.attention.wv.weight"] = tensors["layers.1.attention.wv.weight"].int()

    source = directory(tmp_path / "in")
    message = error_of(change(change(source, 0, update), 1, update))
    for part in (
        "norm.weight: missing",
        "surplus: unexpected",
        "layers.1.attention.wk.weight: found shape [3, 32], expected [16, 32] of 2 shards together",
        "layers.1.attention.wv.weight: found dtype int32, expected F64",
    ):
        assert part in message


def test_shards_that_do_not_match(tmp_path: Path) -> None:
    def missing(tensors: Tensors) -> None:
        del tensors["norm.weight"]

    def other(tensors: Tensors) -> None:
        tensors["norm.weight"] = tensors["norm.weight"] + 1

    def half(tensors: Tensors) -> None:
        tensors["norm.weight"] = tensors["norm.weight"].half()

    source = directory(tmp_path / "in")
    message = error_of(change(source, 1, other))
    assert (
        "consolidated.01.pth: tensor norm.weight: differs from shard 0, expected a copy" in message
    )
    assert "norm.weight: found F16[32] and F32[32]" in error_of(change(source, 1, half))
    assert "norm.weight: missing in shard 1" in error_of(change(source, 1, missing))
    (source / "consolidated.01.pth").rename(source / "consolidated.02.pth")
    assert "consolidated.01.pth: not found, expected shards 0 to 2" in error_of(source)


def test_missing_params_and_links_that_leave_the_directory(tmp_path: Path) -> None:
    source = directory(tmp_path / "in")
    (source / "params.json").rename(tmp_path / "params.json")
    assert "params.json: not found" in error_of(source)
    (source / "params.json").symlink_to(tmp_path / "params.json")
    assert "expected it to stay within" in error_of(source)
    (source / "params.json").unlink()
    (tmp_path / "params.json").rename(source / "params.json")
    (source / "consolidated.01.pth").rename(tmp_path / "x.pth")
    (source / "consolidated.01.pth").symlink_to(tmp_path / "x.pth")
    assert "expected it to stay within" in error_of(source)


def test_info_counts_shards(tmp_path: Path) -> None:
    facts = info(directory(tmp_path / "in"))
    assert facts["format"] == "Meta, 2 shards"
    assert facts["parameters"] == sum(t.numel() for t in weights(tiny()).values())
    assert facts["problems"] == []


def test_truncations_and_bit_flips_anywhere(tmp_path: Path) -> None:
    """Of what we write every byte of a tensor is under a checksum: no flip gives another value."""
    meta = convert(hf_directory(tmp_path / "in", tiny()), tmp_path / "meta", to="meta")
    file = meta / "consolidated.00.pth"
    content, expected = file.read_bytes(), weights(tiny())
    rng = random.Random(0)
    for _ in range(60):
        file.write_bytes(content[: rng.randrange(len(content))])
        error_of(meta)
    refused = 0
    for _ in range(120):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            converted = {name: torch.from_numpy(values) for name, values in read_all(meta).items()}
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert "consolidated.00.pth" in str(error)
        else:
            assert same(converted, expected) == []
    assert refused > 60
