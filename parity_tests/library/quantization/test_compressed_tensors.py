"""Quantized models saved as compressed-tensors, whose own bytes prove the reader that reads them here."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.torch import load_file

from llama_jax import LlamaForCausalLM, dequantize, quantize
from llama_jax.__main__ import main
from llama_jax.checkpoints.huggingface import to_hf_tensors
from parity_tests.library.checkpoints.quantized.tiny import CONFIG, FIXTURES, KEYS


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 16), (4, 32)])
def test_the_same_weights(
    model: LlamaForCausalLM, tmp_path: Path, bits: int, group_size: int | None
) -> None:
    quantized = quantize(model, bits, group_size, vocabulary=False, symmetric=True)
    quantized.save_pretrained(tmp_path / "q", compressed_tensors=True)
    expected = dict(to_hf_tensors(dequantize(quantized)))
    loaded = dict(to_hf_tensors(LlamaForCausalLM.from_pretrained(tmp_path / "q")))
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(loaded[name], values, err_msg=name)
    # our own form holds it, too
    quantized.save_pretrained(tmp_path / "ours")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, values in to_hf_tensors(dequantize(ours)):
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("fixture", "bits", "group_size"), [("ct_int4_group", 4, 32), ("ct_int8_packed", 8, None)]
)
def test_layout_is_the_librarys(
    model: LlamaForCausalLM, tmp_path: Path, fixture: str, bits: int, group_size: int | None
) -> None:
    quantized = quantize(model, bits, group_size, vocabulary=False, symmetric=True)
    quantized.save_pretrained(tmp_path / "q", compressed_tensors=True)
    with safe_open(FIXTURES / f"{fixture}.safetensors", "pt") as file:
        theirs = {key: file.get_tensor(key) for key in file.keys() if key.startswith(KEYS)}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    ours = {key: value for key, value in tensors.items() if key.startswith(KEYS)}
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    shape = f"{KEYS}.weight_shape"
    assert torch.equal(ours[shape], theirs[shape])
    fields = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    weights = fields["config_groups"]["group_0"]["weights"]
    reference = config["config_groups"]["group_0"]["weights"]
    assert weights == {name: reference.get(name) for name in weights}
    assert fields["format"] == config["format"]


def test_symmetric_codes_lose_little(model: LlamaForCausalLM) -> None:
    """Of normal weights a grid around 0 costs little against one with a zero."""
    errors = []
    for symmetric in (False, True):
        restored = dequantize(quantize(model, 4, 32, vocabulary=False, symmetric=symmetric))
        difference = (
            restored.model.layers.mlp.up_proj.weight[...]
            - model.model.layers.mlp.up_proj.weight[...]
        )
        errors.append(float(jnp.sqrt(jnp.mean(difference**2))))
    assert errors[0] < errors[1] < 1.3 * errors[0]


def test_refusals(model: LlamaForCausalLM, tmp_path: Path) -> None:
    cases = [
        (model, "found a model that is not quantized"),
        (quantize(model, 8), "the embedding is quantized; quantize with vocabulary=False"),
        (quantize(model, 4, 32, vocabulary=False), "found zeros other than 0"),
        (
            quantize(model, 4, 64, vocabulary=False, symmetric=True),
            "down_proj.weight.codes: found 8 bits and groups of 96 columns, expected 4 bits and 64",
        ),
    ]
    for quantized, message in cases:
        with pytest.raises(ValueError, match=message):
            quantized.save_pretrained(tmp_path / "q", compressed_tensors=True)
        assert not (tmp_path / "q").exists()


def test_command(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    source, out = str(tmp_path / "m"), str(tmp_path / "q")
    options = ["--bits", "4", "--group-size", "32", "--format", "compressed-tensors"]
    assert main(["quantize", "--model", source, "--out", out, *options]) == 0
    fields = json.loads((tmp_path / "q" / "config.json").read_text())
    assert fields["quantization_config"]["quant_method"] == "compressed-tensors"
    LlamaForCausalLM.from_pretrained(out)
