"""A Hugging Face directory survives loading and saving, bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFLlama

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.numerics.rope import longrope_attention_factor
from parity_tests.harness.cases import (
    BASE,
    BY_NAME,
    ROPES,
    Case,
    hf_model,
    inputs_of,
    weights_of,
    write_hf_directory,
)

# Every tensor that can be there or not, and every rotary type in the layout it comes in.
CASES = [
    *(BY_NAME[n] for n in ("mha", "mqa", "head_dim_wider", "tied", "attention_bias", "mlp_bias")),
    *(BY_NAME[n] for n in ("rope_yarn", "rope_longrope_long", "rope_llama32_v4", "everything")),
]


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the directory's safetensors files."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def written(tmp_path: Path, case: Case, dtype: torch.dtype) -> Path:
    """A Hugging Face directory of this dtype, with its config in the layout of the case."""
    directory = tmp_path / "hf"
    hf_model(case.config, weights_of(case.config)).to(dtype).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(case.config))
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_round_trip_is_bitwise(tmp_path: Path, case: Case, dtype: torch.dtype) -> None:
    source = written(tmp_path, case, dtype)
    LlamaForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "ours")
    before, after = tensors_in(source), tensors_in(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype, name
        assert torch.equal(bits(after[name]), bits(tensor)), name


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_transformers_reads_the_directory(tmp_path: Path, case: Case) -> None:
    """No tensor is missing or unexpected, and the model is the same function."""
    source = written(tmp_path, case, torch.float32)
    LlamaForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "ours")
    before = HFLlama.from_pretrained(source)
    after, report = HFLlama.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    if not case.config["tie_word_embeddings"]:
        after.load_state_dict(tensors_in(tmp_path / "ours"), strict=True)
    ids = torch.from_numpy(inputs_of(case.inputs, case.config).get("input_ids"))
    assert torch.equal(before(ids).logits, after(ids).logits)


def meaning(config: HFConfig) -> dict[str, Any]:
    """The fields of a config that decide the model."""
    fields = config.to_dict()
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    return fields


def older_layout(fields: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields as transformers v4 reads them: it does not know `rope_parameters`."""
    return {name: value for name, value in fields.items() if name != "rope_parameters"}


def newer_layout(fields: dict[str, Any]) -> dict[str, Any]:
    """As transformers v5 reads them when nothing of the older layout is there."""
    return {n: v for n, v in fields.items() if n not in ("rope_theta", "rope_scaling")}


@pytest.mark.parametrize("case", [*CASES, *ROPES], ids=repr)
def test_both_layouts_mean_the_same_model(case: Case) -> None:
    """An old reader that only sees the new field would silently use a theta of 10000."""
    want = meaning(HFConfig.from_dict(dict(case.config)))
    ours = json.loads(json.dumps(LlamaConfig.from_dict(case.config).to_dict()))
    for layout in (dict, older_layout, newer_layout):
        got = meaning(HFConfig.from_dict(layout(ours)))
        for name in ("rope_scaling", "rope_theta"):  # kept by v5 as fields it does not know
            got.pop(name, None)
        assert comparable(got) == comparable(want), layout.__name__


def comparable(fields: dict[str, Any]) -> dict[str, Any]:
    """Without the older spelling of rope_type, and without fields that say nothing."""
    rope = {n: v for n, v in fields["rope_parameters"].items() if n != "type" and v is not None}
    if rope["rope_type"] == "longrope":
        # written for transformers 4, which reads the one outside and never the factor
        fields = {n: v for n, v in fields.items() if n != "original_max_position_embeddings"}
        if "factor" in rope:
            trained = rope["original_max_position_embeddings"]
            derived = math.sqrt(1 + math.log(rope["factor"]) / math.log(trained))
            rope.setdefault("attention_factor", derived)
    return {n: v for n, v in fields.items() if v is not None} | {"rope_parameters": rope}


@pytest.mark.parametrize("factor", [None, 2.0, 3.0])
def test_transformers_4_reads_the_same_longrope(factor: float | None) -> None:
    """By the rule of its `_compute_longrope_parameters`, which looks outside the dictionary first."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope |= {"original_max_position_embeddings": 16} | ({"factor": factor} if factor else {})
    config = LlamaConfig.from_dict(
        {"rope_scaling": rope, "head_dim": 16, "max_position_embeddings": 64}
    )
    fields = config.to_dict()
    trained = fields["original_max_position_embeddings"]
    by_version_4 = fields["rope_scaling"].get("attention_factor")
    if by_version_4 is None:
        ratio = fields["max_position_embeddings"] / trained
        by_version_4 = math.sqrt(1 + math.log(ratio) / math.log(trained))
    assert trained == 16
    assert by_version_4 == longrope_attention_factor(config.rope, 64)
    expected_factor = factor or 64 / 16
    assert by_version_4 == math.sqrt(1 + math.log(expected_factor) / math.log(16))


@pytest.mark.parametrize("case", [*CASES, *ROPES], ids=repr)
def test_config_round_trip(case: Case) -> None:
    once = LlamaConfig.from_dict(case.config)
    assert LlamaConfig.from_dict(once.to_dict()) == once


def test_a_sharded_directory_reads_the_same(tmp_path: Path) -> None:
    config, weights = BASE, weights_of(BASE)
    write_hf_directory(tmp_path / "one", config, weights)
    write_hf_directory(tmp_path / "many", config, weights, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    ids = jnp.asarray(inputs_of(BY_NAME["mha"].inputs, config)["input_ids"], jnp.int32)
    one, many = (
        LlamaForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("one", "many")
    )
    assert np.array_equal(one, many)
    LlamaForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(
        tmp_path / "ours", max_shard_size=20_000
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    after = HFLlama.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
