"""GGUF Llamas become the Hugging Face Llamas they were made from."""

from __future__ import annotations

import json
import math
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from convert import convert, info
from convert.checkpoint import DTYPES
from convert.formats.gguf import read
from parity_tests.convert.formats.gguf.tiny_gguf import (
    BF16,
    F16,
    gguf_tensors,
    metadata,
    permute,
    same,
    tiny_gguf,
    tiny_model,
    write_gguf,
)

QUANTIZABLE = [
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q8_0,
    Type.TQ1_0,
    Type.TQ2_0,
    Type.MXFP4,
]
DEQUANTIZABLE = [
    Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.NVFP4, Type.IQ2_XXS, Type.IQ2_XS,
    Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ1_S, Type.IQ1_M, Type.IQ4_NL, Type.IQ4_XS,
]  # fmt: skip


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


def load(directory: Path) -> LlamaForCausalLM:
    model, report = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_key_value_heads": 4}, id="MHA"),
        pytest.param({"num_key_value_heads": 2}, id="GQA"),
        pytest.param({"num_key_value_heads": 1}, id="MQA"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"head_dim": 12}, id="head_dim"),
        pytest.param({"attention_bias": True}, id="attention_bias"),
        pytest.param({"mlp_bias": True, "attention_bias": True}, id="biases"),
        pytest.param({"rope_theta": 500000.0, "rms_norm_eps": 1e-6}, id="theta-eps"),
    ],
)
def test_a_float32_file_is_the_model_it_came_from(tmp_path: Path, options: dict) -> None:
    model = tiny_model(**options)
    convert(tiny_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    converted = load(tmp_path / "out")
    assert same(converted.state_dict(), model.state_dict()) == []
    assert torch.equal(logits(converted), logits(model))
    for field in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_parameters", "bos_token_id",
        "eos_token_id", "pad_token_id", "hidden_act",
    ):  # fmt: skip
        assert getattr(converted.config, field) == getattr(model.config, field), field


def test_the_config_serves_both_majors_of_transformers(tmp_path: Path) -> None:
    convert(tiny_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-05


@pytest.mark.parametrize(("type_", "dtype"), [(F16, torch.float16), (BF16, torch.bfloat16)])
def test_half_precision_keeps_its_values(tmp_path: Path, type_: Type, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype).float()  # values that the type holds exactly
    convert(tiny_gguf(tmp_path / "m.gguf", model, type_=type_), tmp_path / "out")
    converted = load_file(tmp_path / "out/model.safetensors")
    assert same(converted, model.to(dtype).state_dict()) == []


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_requested_dtype_rounds_as_torch_does(tmp_path: Path, dtype: str) -> None:
    model = tiny_model()
    convert(tiny_gguf(tmp_path / "m.gguf", model), tmp_path / "out", dtype=dtype)
    converted = load_file(tmp_path / "out/model.safetensors")
    assert same(converted, model.to(getattr(torch, dtype)).state_dict()) == []


@pytest.mark.parametrize("type_", QUANTIZABLE, ids=lambda t: t.name)
def test_quantized_files_are_read_as_transformers_reads_them(tmp_path: Path, type_: Type) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = tiny_model(**sizes)
    path = tiny_gguf(tmp_path / "m.gguf", model, type_=type_)
    convert(path, tmp_path / "out")
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert same(load_file(tmp_path / "out/model.safetensors"), expected) == []


@pytest.mark.parametrize("type_", DEQUANTIZABLE, ids=lambda t: t.name)
def test_every_type_that_the_library_dequantizes(tmp_path: Path, type_: Type) -> None:
    model = tiny_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    block, block_bytes = GGML_QUANT_SIZES[type_]
    random = np.random.default_rng(0)
    tensors = {}
    for name, values in gguf_tensors(model).items():
        if values.ndim == 2:
            # Bytes below 0x40 make every float16 or float8 scale among them finite.
            shape = (len(values), values.shape[1] // block * block_bytes)
            tensors[name] = (random.integers(0, 0x40, shape, dtype=np.uint8), type_)
    path = tiny_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    convert(path, tmp_path / "out")
    converted = load_file(tmp_path / "out/model.safetensors")
    for name, gguf_name, heads in [
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", 0),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", 2),
    ]:
        expected = dequantize(*tensors[gguf_name])
        values = converted[name].numpy()
        assert np.array_equal(permute(values, heads) if heads else values, expected)
        assert expected.std() > 0


def test_large_matrices_are_dequantized_in_parts_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", type_=Type.Q8_0, model=tiny_model(intermediate_size=64))
    checkpoint = read(path)
    expected = {spec.name: checkpoint.load(spec.name) for spec in checkpoint.tensors}
    monkeypatch.setattr("convert.formats.gguf.tensors._CHUNK", 32 * 7)
    for name, values in expected.items():
        assert np.array_equal(checkpoint.load(name), values), name


def test_types_the_library_cannot_dequantize_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    values = np.zeros((40, 32), np.float64)
    path = tiny_gguf(tmp_path / "m.gguf", model, tensors={"token_embd.weight": (values, Type.F64)})
    with pytest.raises(ValueError, match=r"token_embd\.weight has type F64, which cannot be deq"):
        read(path)


def test_defaults_of_missing_metadata_are_those_of_llama_cpp(tmp_path: Path) -> None:
    missing = (
        "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "rope.dimension_count", "rope.freq_base", "vocab_size",
    )  # fmt: skip
    model = tiny_model(num_key_value_heads=4)
    fields = {f"llama.{key}": None for key in missing} | {"tokenizer.ggml.model": "llama"}
    fields |= {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
    config = read(tiny_gguf(tmp_path / "m.gguf", model, fields=fields), tokenizer=False).config
    assert (config["num_key_value_heads"], config["head_dim"], config["vocab_size"]) == (4, 8, 40)
    assert config["rope_theta"] == 10000.0
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_per_layer_arrays_must_be_constant(tmp_path: Path) -> None:
    key = "llama.attention.head_count_kv"
    config = read(tiny_gguf(tmp_path / "a.gguf", fields={key: [2, 2]})).config
    assert config["num_key_value_heads"] == 2
    with pytest.raises(ValueError, match=r"head_count_kv differs between layers \(\[1, 2\]\)"):
        read(tiny_gguf(tmp_path / "b.gguf", fields={key: [2, 1]}))


def test_biases_that_only_some_projections_have_become_zeros(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    absent = {f"blk.{i}.attn_output.bias": None for i in range(2)}
    path = tiny_gguf(tmp_path / "m.gguf", model, tensors=absent)
    convert(path, tmp_path / "out")
    assert same(load(tmp_path / "out").state_dict(), model.state_dict()) == []
    assert info(path)["notes"][0].startswith("2 biases")
    with pytest.raises(ValueError, match=r"blk\.1\.attn_output\.bias is missing"):
        read(tiny_gguf(tmp_path / "b.gguf", tiny_model(attention_bias=True),
                       tensors={"blk.1.attn_output.bias": None}))  # fmt: skip


@pytest.mark.parametrize("value", [2**32 - 1, True, "2", 2.0, [2, 3]], ids=str)
def test_special_ids_that_are_no_tokens_are_ignored_with_a_note(tmp_path: Path, value: Any) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", fields={"tokenizer.ggml.padding_token_id": value})
    checkpoint = read(path)
    assert checkpoint.config["pad_token_id"] is None
    assert any("padding_token_id" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count is 8, expected 0"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4, expected 8: rotary"),
        ({"llama.attention.value_length": 4}, "attention.value_length is 4, expected 8"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5, expected 1/sqrt"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False, expected True"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is .*2.0.*, expected 1"),
        ({"llama.context_length": None}, "llama.context_length is None, expected a positive"),
        ({"llama.block_count": 2**31}, "llama.block_count is 2147483648, expected a positive"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0, expected a pos"),
        ({"llama.attention.head_count_kv": 3}, "head_count is 4, expected a multiple of 3"),
        ({"llama.embedding_length": "32"}, "embedding_length is '32', expected a positive"),
        ({"llama.rope.freq_base": math.nan}, "rope.freq_base is .*nan.*, expected a finite"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is None, expected a fin"),
        ({"llama.vocab_size": 41}, "token_embd.weight has 40 rows, expected 41"),
        ({"llama.rope.scaling.type": "dynamic"}, "scaling.type is 'dynamic', expected none, lin"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is 2.0, expected 1 without yarn or"),
    ],
)
def test_unsupported_hyperparameters_are_named(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tiny_gguf(tmp_path / "m.gguf", fields=fields))


def test_another_architecture(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match="architecture is 'qwen2', expected 'llama'"):
        read(path)


def test_all_problems_of_the_tensors_are_reported_at_once(tmp_path: Path) -> None:
    tensors = {
        "blk.0.attn_q.weight": None,
        "blk.1.ffn_up.weight": np.zeros((47, 32), np.float32),
        "blk.1.attn_k_norm.weight": np.zeros(8, np.float32),
    }
    with pytest.raises(ValueError) as caught:
        read(tiny_gguf(tmp_path / "m.gguf", tensors=tensors))
    message = str(caught.value)
    assert "blk.0.attn_q.weight is missing, expected [32, 32]" in message
    assert "blk.1.ffn_up.weight is [47, 32], expected [48, 32]" in message
    assert "blk.1.attn_k_norm.weight does not belong to a Llama" in message


def test_values_that_are_not_finite_or_overflow(tmp_path: Path) -> None:
    bad = np.ones(32, np.float32)
    bad[3] = np.nan
    path = tiny_gguf(tmp_path / "a.gguf", tensors={"output_norm.weight": bad})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: 1 values are NaN or infinite"):
        convert(path, tmp_path / "out")
    bad[3] = 70000.0
    path = tiny_gguf(tmp_path / "b.gguf", tensors={"output_norm.weight": bad})
    with pytest.raises(ValueError, match="1 values overflow float16, largest magnitude 70000"):
        convert(path, tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    convert(path, tmp_path / "out", dtype="bfloat16")


def test_a_sharded_file(tmp_path: Path) -> None:
    model = tiny_model()
    tensors, fields = gguf_tensors(model), metadata(model)
    names = list(tensors)
    for i, part in enumerate([names[:3], names[3:9], names[9:]]):
        split = {"split.no": i, "split.count": 3, "split.tensors.count": len(names)}
        path = tmp_path / f"m-{i + 1:05d}-of-00003.gguf"
        write_gguf(path, {n: tensors[n] for n in part}, (fields if i == 0 else {}) | split)
    for i in (1, 3):
        convert(tmp_path / f"m-0000{i}-of-00003.gguf", tmp_path / f"out{i}")
        assert same(load(tmp_path / f"out{i}").state_dict(), model.state_dict()) == []
    files = read(tmp_path / "m-00001-of-00003.gguf").weight_files
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"shards missing: m-00002-of-00003\.gguf"):
        read(tmp_path / "m-00001-of-00003.gguf")
    (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "renamed.gguf")
    with pytest.raises(
        ValueError, match="one of 3 shards, expected to be named NAME-00001-of-00003"
    ):
        read(tmp_path / "renamed.gguf")


def test_the_generation_config_stops_at_every_end(tmp_path: Path) -> None:
    fields = {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 2,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 40,
    }
    files = read(tiny_gguf(tmp_path / "m.gguf", fields=fields)).files
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "temperature": 0.6,
        "top_k": 40,
        "do_sample": True,
    }


def test_info_counts_and_names(tmp_path: Path) -> None:
    model = tiny_model()
    facts = info(tiny_gguf(tmp_path / "m.gguf", model, type_=F16, fields={"general.name": "Tiny"}))
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["stored"]["F16"]["tensors"] == 16
    assert facts["stored"]["F32"]["tensors"] == 5
    assert (facts["name"], facts["format"], facts["default_dtype"]) == (
        "Tiny",
        "GGUF v3",
        "float16",
    )
    json.dumps(facts)


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.formats.gguf.tensors._CHUNK", 2**16)
    monkeypatch.setattr("convert.casting._BLOCK", 2**16)
    # its memory would count as taken from the start
    monkeypatch.setattr("convert.conversion.reused_buffers", lambda nbytes: nullcontext())
    model = tiny_model(hidden_size=256, intermediate_size=8000)
    path = tiny_gguf(tmp_path / "m.gguf", model, type_=Type.Q8_0)
    largest = 256 * 8000 * 4
    tracemalloc.start()
    convert(path, tmp_path / "out", dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # as float32, cast to half of that, and the two before, which are written and given up
    assert largest < peak < 2.5 * largest + 2 * 2**20


def test_float32_metadata_is_read_as_the_decimal_it_was_written_from(tmp_path: Path) -> None:
    for eps in (1e-5, 1e-6, 3e-7):
        path = tiny_gguf(tmp_path / f"{eps}.gguf", tiny_model(rms_norm_eps=eps))
        assert read(path).config["rms_norm_eps"] == eps


def test_bfloat16_needs_no_float32_in_between(tmp_path: Path) -> None:
    checkpoint = read(tiny_gguf(tmp_path / "m.gguf", type_=BF16))
    assert checkpoint.load("model.embed_tokens.weight").dtype == ml_dtypes.bfloat16
    assert checkpoint.tensors[0].dtype == ml_dtypes.bfloat16
