"""GGUF files written here: read back, read by others, and refused where llama.cpp has no such thing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from convert import convert, info, plan
from convert.formats.gguf import read, target_specs
from convert.formats.gguf.q8_0 import dequantized, quantized
from parity_tests.convert.formats.gguf.tiny_gguf import (
    gguf_name,
    llama3_tensor,
    permute,
    same,
    tiny_gguf,
    tiny_model,
)
from parity_tests.harness.child_process import ROOT

DTYPES = ("float32", "bfloat16", "float16")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.25, 4.0],
    "long_factor": [1.0, 1.5, 2.25, 4.0],
    "attention_factor": 1.0,
    "original_max_position_embeddings": 64,
}


def saved(directory: Path, model: LlamaForCausalLM, dtype: str = "float32") -> Path:
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) % model.config.vocab_size).logits


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, tuple[GGMLQuantizationType, bytes]]:
    tensors = GGUFReader(path).tensors
    return {t.name: (t.tensor_type, np.ascontiguousarray(t.data).tobytes()) for t in tensors}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries(
        {
            "num_key_value_heads": st.sampled_from([4, 2, 1]),
            "tie_word_embeddings": st.booleans(),
            "attention_bias": st.booleans(),
            "mlp_bias": st.booleans(),
            "head_dim": st.sampled_from([8, 12, 2]),
            "vocab_size": st.sampled_from([40, 41]),
        }
    ),
    st.sampled_from(DTYPES),
)
def test_hugging_face_to_gguf_and_back_is_bitwise(options: dict[str, Any], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, model = Path(folder), tiny_model(num_hidden_layers=1, **options)
        saved(home / "in", model, dtype)
        convert(convert(home / "in", home / "m.gguf"), home / "out")
        tensors = load_file(home / "out/model.safetensors")
        expected = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
        if not options["tie_word_embeddings"]:
            expected["lm_head.weight"] = model.state_dict()["lm_head.weight"]
        assert same(tensors, expected) == []
        config = json.loads((home / "out/config.json").read_text())
        for name, value in options.items():
            assert config[name] == value, name
        assert config["dtype"] == dtype


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_gguf_library_reads_what_llama_cpps_converter_would_write(
    tmp_path: Path, kv_heads: int
) -> None:
    model = tiny_model(num_key_value_heads=kv_heads, attention_bias=True, vocab_size=64)
    convert(saved(tmp_path / "in", model), tmp_path / "m.gguf", dtype="float16")
    tensors = GGUFReader(tmp_path / "m.gguf").tensors
    expected = dict(model.float().state_dict())
    assert {t.name for t in tensors} == {gguf_name(name) for name in expected}
    for tensor in tensors:
        name = next(name for name in expected if gguf_name(name) == tensor.name)
        values = expected[name].numpy()
        heads = 4 if ".q_proj." in name else kv_heads if ".k_proj." in name else 0
        values = permute(values, heads) if heads else values
        if values.ndim > 1:
            values = values.astype(np.float16)
        assert tensor.data.dtype == values.dtype
        assert np.array_equal(tensor.data, values), name


@pytest.mark.parametrize("dtype", [*DTYPES, "q8_0"])
def test_metadata(tmp_path: Path, dtype: str) -> None:
    model = tiny_model(head_dim=12, rope_theta=500000.0, rms_norm_eps=1e-6)
    convert(saved(tmp_path / "in", model), tmp_path / "Tiny.gguf", dtype=dtype)
    written = fields(tmp_path / "Tiny.gguf")
    file_type = {
        "float32": LlamaFileType.ALL_F32,
        "bfloat16": LlamaFileType.MOSTLY_BF16,
        "float16": LlamaFileType.MOSTLY_F16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    parameters = sum(p.numel() for p in model.parameters())
    assert {k: v for k, v in written.items() if not k.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny",
        "general.size_label": f"{parameters / 1000:.0f}K",
        "general.quantization_version": 2,
        "general.file_type": file_type[dtype],
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": 40,
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_key_value_heads": 4}, id="MHA"),
        pytest.param({"num_key_value_heads": 1}, id="MQA"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"head_dim": 12, "rope_theta": 1e6, "rms_norm_eps": 1e-6}, id="head_dim"),
    ],
)
def test_transformers_own_loader_computes_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_model(**options)
    convert(saved(tmp_path / "in", model), tmp_path / "m.gguf")
    loaded = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=model)
    loaded_model = LlamaForCausalLM(LlamaConfig(**loaded["config"])).eval()
    missing, unexpected = loaded_model.load_state_dict(loaded["tensors"], strict=False)
    assert missing == (["lm_head.weight"] if options.get("tie_word_embeddings") else [])
    assert unexpected == []
    assert torch.equal(logits(loaded_model), logits(model))


# --- q8_0 --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.float32, (3, 64), elements=st.floats(-1e6, 1e6, width=32)),
    st.integers(-120, 20),
)
def test_blocks_survive_being_read_and_quantized_again(values: np.ndarray, power: int) -> None:
    values = np.ldexp(values, power).clip(-8e6, 8e6)
    once = dequantized("x", values)
    with np.errstate(all="ignore"):
        blocks = quantize(values, GGMLQuantizationType.Q8_0)
        assert np.array_equal(once, dequantize(blocks, GGMLQuantizationType.Q8_0))
    again = quantized(once)
    assert np.array_equal(dequantize(again, GGMLQuantizationType.Q8_0), once)
    scales = blocks.reshape(-1, 34)[:, :2].copy().view(np.float16)[:, 0]
    if (scales != 0).all():  # a block of zeros may be quantized to anything times zero
        assert np.array_equal(again, blocks)


def test_q8_0_files(tmp_path: Path) -> None:
    model = tiny_model(hidden_size=64, intermediate_size=96, head_dim=12)
    source = saved(tmp_path / "in", model)
    convert(source, tmp_path / "m.gguf", dtype="q8_0")
    types = {name: type_.name for name, (type_, _) in tensors(tmp_path / "m.gguf").items()}
    assert types["blk.0.attn_output.weight"] == "F16"  # rows of 4 * 12 are not blocks of 32
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert {types[n] for n in ("token_embd.weight", "blk.1.ffn_down.weight")} == {"Q8_0"}
    for name, tensor in model.float().state_dict().items():
        type_, data = tensors(tmp_path / "m.gguf")[gguf_name(name)]
        if type_.name == "Q8_0" and "q_proj" not in name and "k_proj" not in name:
            assert quantize(tensor.numpy(), type_).tobytes() == data, name
    convert(tmp_path / "m.gguf", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "again.gguf", dtype="q8_0")
    assert tensors(tmp_path / "again.gguf") == tensors(tmp_path / "m.gguf")


def test_the_bytes_that_were_planned_are_written(tmp_path: Path) -> None:
    source = saved(tmp_path / "in", tiny_model(hidden_size=64, head_dim=12))
    for dtype in (*DTYPES, "q8_0"):
        path = tmp_path / f"{dtype}.gguf"
        planned = plan(source, path, dtype=dtype).bytes_to_write
        tensors = GGUFReader(convert(source, path, dtype=dtype)).tensors
        assert planned == sum(t.n_bytes for t in tensors)
        last = tensors[-1]
        assert path.stat().st_size == -(-(last.data_offset + last.n_bytes) // 32) * 32


def test_q8_0_overflow_is_an_error(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1e7
    source = saved(tmp_path / "in", model)
    with pytest.raises(
        ValueError, match=r"embed_tokens\.weight: values overflow the float16 scale"
    ):
        convert(source, tmp_path / "m.gguf", dtype="q8_0")
    assert not (tmp_path / "m.gguf").exists()


# --- rope --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope",
    [
        pytest.param({"rope_type": "linear", "factor": 2.5}, id="linear"),
        pytest.param(YARN, id="yarn"),
        pytest.param(YARN | {"attention_factor": 1.25}, id="yarn-attention"),
        pytest.param(YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5}, id="yarn-beta"),
        pytest.param(YARN | {"truncate": False}, id="yarn-truncate"),
        pytest.param(YARN | {"factor": 0.5}, id="yarn-below-1"),
        pytest.param(LONGROPE | {"attention_factor": 1.25}, id="longrope-attention"),
        pytest.param({"rope_type": "proportional", "factor": 2.0}, id="proportional"),
        pytest.param(YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}, id="yarn-mscale"),
        pytest.param(LLAMA3, id="llama3.1"),
        pytest.param(LLAMA3 | {"factor": 32.0}, id="llama3.2"),
        pytest.param(LLAMA3 | {"original_max_position_embeddings": 48, "factor": 3.0}, id="llama3-other"),
        pytest.param(LONGROPE, id="longrope"),
    ],
)  # fmt: skip
def test_rope_comes_back(tmp_path: Path, rope: dict[str, Any]) -> None:
    plain_yarn = rope["rope_type"] == "yarn" and not rope.keys() & {"beta_fast", "truncate"}
    worked_out = rope["rope_type"] != "linear" and not (plain_yarn and rope["factor"] > 1)
    rope = {"rope_theta": 10000.0, **rope}
    model = tiny_model(rope_parameters=rope, rope_theta=rope["rope_theta"])
    saved(tmp_path / "in", model)
    # the proof compares the frequencies and the factor on cos and sin
    convert(tmp_path / "in", tmp_path / "m.gguf")
    parameters = read(tmp_path / "m.gguf").config["rope_parameters"]
    if rope["rope_type"] == "llama3" and rope["original_max_position_embeddings"] == 8192:
        assert parameters == rope
    elif not worked_out:
        assert parameters["rope_type"] == rope["rope_type"]
    assert ("rope_freqs.weight" in tensors(tmp_path / "m.gguf")) == worked_out
    convert(tmp_path / "m.gguf", tmp_path / "out")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(back), logits(model), rtol=1e-4, atol=1e-5)


def test_llama3_factors_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    model = tiny_model(head_dim=64, rope_parameters=LLAMA3, rope_theta=500000.0)
    convert(saved(tmp_path / "in", model), tmp_path / "m.gguf")
    first = GGUFReader(tmp_path / "m.gguf").tensors[0]
    assert first.name == "rope_freqs.weight"
    expected = llama3_tensor(64, 500000.0, 8.0, 1.0, 4.0, 8192)
    assert np.allclose(first.data, expected, rtol=2.0**-21, atol=0)


# --- what is refused, before anything is written -----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
        ({"rms_norm_eps": 1e-50}, "rms_norm_eps: found 1e-50, expected a positive float32"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type: found 'dynamic' with frequencies that depend on the current length",
        ),
        (
            {"rope_parameters": LONGROPE | {"long_factor": [1.0, 2.0, 3.0, 4.0]}},
            "rope_type: found 'longrope' with frequencies that depend on the current length",
        ),
        (
            {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
            "rope_type: found 'proportional' with features that are not rotated",
        ),
    ],
)
def test_a_config_that_llama_cpp_cannot_run(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    saved(tmp_path / "in", tiny_model())
    config = json.loads((tmp_path / "in/config.json").read_text())
    if "rope_parameters" in options:
        options["rope_parameters"] = {"rope_theta": 10000.0, **options["rope_parameters"]}
    (tmp_path / "in/config.json").write_text(json.dumps(config | options))
    with pytest.raises(ValueError, match=message) as caught:
        plan(tmp_path / "in", tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_float64_matrices_need_a_dtype(tmp_path: Path) -> None:
    source = read(tiny_gguf(tmp_path / "in.gguf"))
    wide = [replace(spec, dtype=np.dtype(np.float64)) for spec in source.tensors]
    wide_source = replace(source, tensors=tuple(wide))
    with pytest.raises(ValueError, match="is float64, expected --dtype float32, bfloat16, float16"):
        target_specs(wide_source, None)
    assert {spec.dtype for spec in target_specs(wide_source, "float32")} == {np.dtype(np.float32)}


def test_names_and_licenses_are_converted(tmp_path: Path) -> None:
    metadata = {"general.name": "A Model", "general.license": "mit", "general.organization": "Us"}
    convert(tiny_gguf(tmp_path / "in.gguf", fields=metadata), tmp_path / "m.gguf")
    facts = info(tmp_path / "m.gguf")
    assert (facts["name"], facts["license"], facts["organization"]) == ("A Model", "mit", "Us")
    assert (
        same(
            {n: torch.tensor(read(tmp_path / "m.gguf").load(n)) for n in ["model.norm.weight"]},
            {n: torch.tensor(read(tmp_path / "in.gguf").load(n)) for n in ["model.norm.weight"]},
        )
        == []
    )


@pytest.mark.parametrize("ends", [[2], [2, 5], [5, 2, 7]])
def test_all_end_tokens_and_the_sampling_are_converted(tmp_path: Path, ends: list[int]) -> None:
    saved(tmp_path / "in", tiny_model())
    generation = {
        "bos_token_id": 1,
        "eos_token_id": ends,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.9,
    }
    (tmp_path / "in/generation_config.json").write_text(json.dumps(generation))
    convert(tmp_path / "in", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out")
    converted = json.loads((tmp_path / "out/generation_config.json").read_text())
    stops = converted.pop("eos_token_id")
    assert sorted([stops] if isinstance(stops, int) else stops) == sorted(ends)
    assert converted == {k: v for k, v in generation.items() if k != "eos_token_id"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, dtype: str) -> None:
    model = tiny_model(vocab_size=100_000, hidden_size=512, num_hidden_layers=1)
    saved(tmp_path / "in", model)
    program = (
        "import re; from convert import convert; "
        f"convert({str(tmp_path / 'in')!r}, {str(tmp_path / 'm.gguf')!r}, dtype={dtype!r}); "
        # ru_maxrss would be at least what this process held when it forked
        r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    peak, largest = int(done.stdout) * 1024, 100_000 * 512 * 4
    assert largest < peak <= 600_000_000 + 3 * largest
