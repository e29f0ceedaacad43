"""llama.cpp's two ways to scale rotary embeddings, held to Hugging Face's inverse frequencies."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from convert import convert
from convert.formats.gguf import read
from convert.formats.gguf.rope import tensor_scaling
from parity_tests.convert.formats.gguf.tiny_gguf import llama3_tensor, tiny_gguf, tiny_model

LLAMA3 = [  # head_dim, theta, factor, low, high, original
    pytest.param(128, 500000.0, 8.0, 1.0, 4.0, 8192, id="3.1-8B"),
    pytest.param(64, 500000.0, 32.0, 1.0, 4.0, 8192, id="3.2-1B"),
    pytest.param(128, 500000.0, 16.0, 1.0, 4.0, 8192, id="factor-16"),
    pytest.param(64, 10000.0, 4.0, 1.0, 4.0, 2048, id="original-2048"),
    pytest.param(128, 500000.0, 8.0, 1.0, 8.0, 8192, id="high-8"),
    pytest.param(128, 1000000.0, 10.0, 1.0, 32.0, 5000, id="all-unusual"),
]


@pytest.mark.parametrize(("head_dim", "theta", "factor", "low", "high", "original"), LLAMA3)
def test_llama3_constants_are_recovered(
    head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> None:
    tensor = llama3_tensor(head_dim, theta, factor, low, high, original)
    assert tensor_scaling(
        tensor, head_dim=head_dim, theta=theta, context_length=131072, attention_factor=1.0
    ) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_a_common_multiple_of_the_constants_is_the_same_scaling() -> None:
    tensor = llama3_tensor(128, 500000.0, 8.0, 2.0, 8.0, 8192)
    parameters = tensor_scaling(
        tensor, head_dim=128, theta=500000.0, context_length=131072, attention_factor=1.0
    )
    assert parameters["rope_type"] == "llama3"
    assert (
        parameters["low_freq_factor"] / parameters["original_max_position_embeddings"] == 2.0 / 8192
    )
    assert (
        parameters["high_freq_factor"] / parameters["original_max_position_embeddings"]
        == 8.0 / 8192
    )


def test_a_tensor_that_is_not_llama3s_is_kept_exactly() -> None:
    tensor = np.linspace(1.0, 3.7, 8, dtype=np.float32)
    parameters = tensor_scaling(
        tensor, head_dim=16, theta=10000.0, context_length=512, attention_factor=1.0
    )
    assert parameters["rope_type"] == "longrope"
    assert parameters["short_factor"] == parameters["long_factor"]
    assert np.array_equal(np.array(parameters["long_factor"], np.float32), tensor)
    assert parameters["attention_factor"] == 1.0


def test_a_single_wrong_entry_is_not_rounded_away() -> None:
    tensor = llama3_tensor(128, 500000.0, 8.0, 1.0, 4.0, 8192)
    tensor[40] *= np.float32(1 + 1e-4)
    parameters = tensor_scaling(
        tensor, head_dim=128, theta=500000.0, context_length=131072, attention_factor=1.0
    )
    assert parameters["rope_type"] == "longrope"


def test_trivial_tensors() -> None:
    scaling = partial(
        tensor_scaling, head_dim=16, theta=10000.0, context_length=512, attention_factor=1.0
    )
    ones = np.ones(8, np.float32)
    assert scaling(ones) == {"rope_type": "default"}
    assert scaling(ones * 3) == {"rope_type": "linear", "factor": 3.0}


ROPE_PARAMETERS = [
    pytest.param({"rope_type": "linear", "factor": 4.0}, id="linear"),
    pytest.param(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, id="yarn"
    ),
    pytest.param(
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
        id="yarn-all",
    ),
    pytest.param(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        id="llama3",
    ),
]


@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
def test_scaled_models_give_the_same_logits(tmp_path: Path, rope: dict) -> None:
    theta = 500000.0
    model = tiny_model(
        rope_parameters={**rope, "rope_theta": theta}, head_dim=16, max_position_embeddings=65536
    )
    fields: dict = {}
    tensors: dict = {}
    if rope["rope_type"] == "llama3":
        constants = [v for k, v in rope.items() if k != "rope_type"]
        tensors["rope_freqs.weight"] = llama3_tensor(16, theta, *constants)
    else:
        fields["llama.rope.scaling.type"] = rope["rope_type"]
        fields["llama.rope.scaling.factor"] = rope["factor"]
        for key, name in [
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ]:
            fields[f"llama.rope.scaling.{key}"] = rope.get(name)
        if "attention_factor" in rope:
            mscale = 0.1 * np.log(rope["factor"]) + 1.0
            fields["llama.rope.scaling.attn_factor"] = rope["attention_factor"] / mscale
    path = tiny_gguf(tmp_path / "m.gguf", model, fields=fields, tensors=tensors)
    convert(path, tmp_path / "out")
    converted = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(converted.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = torch.arange(24).reshape(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


def test_longrope_from_a_tensor_divides_by_it(tmp_path: Path) -> None:
    tensor = np.linspace(1.0, 3.7, 4, dtype=np.float32)
    convert(tiny_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": tensor}), tmp_path / "out")
    rotary = LlamaForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(rotary.inv_freq, plain / torch.from_numpy(tensor))
    assert rotary.attention_scaling == 1.0


def test_a_type_of_none_ignores_the_factor_and_a_missing_type_is_linear(tmp_path: Path) -> None:
    factor = {"llama.rope.scaling.factor": 2.0}
    none = tiny_gguf(tmp_path / "a.gguf", fields=factor | {"llama.rope.scaling.type": "none"})
    assert read(none).config["rope_scaling"] is None
    linear = read(tiny_gguf(tmp_path / "b.gguf", fields=factor)).config
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert linear["rope_parameters"] == linear["rope_scaling"] | {"rope_theta": 10000.0}


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_negative_factor_is_named(tmp_path: Path, kind: str) -> None:
    scaling = {"type": kind, "factor": -1.0, "attn_factor": 2.0}
    fields = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    path = tiny_gguf(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(ValueError, match=r"m\.gguf: .*rope\.scaling\.factor is -1, expected a pos"):
        read(path)


@pytest.mark.parametrize(
    ("tensor", "fields", "message"),
    [
        (np.ones(3, np.float32), {}, r"rope_freqs.weight is F32\[3\], expected F32\[4\]"),
        (np.zeros(4, np.float32), {}, "rope_freqs.weight has values that are not positive"),
        (
            np.linspace(1, 2, 4, dtype=np.float32),
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            "rope.scaling.type linear and rope_freqs.weight are both present, expected one",
        ),
    ],
)
def test_contradictions_are_errors(
    tmp_path: Path, tensor: np.ndarray, fields: dict, message: str
) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": tensor}, fields=fields)
    with pytest.raises(ValueError, match=message):
        read(path)
