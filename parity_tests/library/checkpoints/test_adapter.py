"""LoRA adapters: merged models compute what PEFT computes from base model and adapter."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFModel

import convert
from llama_jax import LlamaForCausalLM
from llama_jax.load import load_model
from parity_tests.convert.test_damage import flip, truncate

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(2, 34)[None]
ATTENTION = ["q_proj", "v_proj"]
LINEAR = [*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "lora_alpha": 16},
    "all linear, rank-stabilized": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"layers.2.self_attn.v_proj": 32},
    },
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 2]},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, DoRA": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "head saved": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "both saved": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding saved, tied": {
        "target_modules": ATTENTION,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "norms saved": {"target_modules": ATTENTION, "modules_to_save": ["norm", "input_layernorm"]},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": [3, 7]},
    "tokens by module": {
        "target_modules": ATTENTION,
        "trainable_token_indices": {"embed_tokens": [3, 7]},
    },
    "biases": {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
}


def base_model(tied: bool = False, **changes: Any) -> HFModel:
    torch.manual_seed(1)
    return HFModel(HFConfig(**SIZES | changes, tie_word_embeddings=tied)).eval()


def write_adapter(
    root: Path, base: HFModel, *, embeddings: bool | str = "auto", **config: Any
) -> Path:
    """Random low-rank matrices, and noise on all else that is trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4} | config)
        lora.base_model_name_or_path = str(root / "base")
        model = get_peft_model(base, lora)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / "adapter", save_embedding_layers=embeddings)
    return root / "adapter"


def peft_logits(base: HFModel, adapter: Path) -> np.ndarray:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, adapter).eval()(IDS).logits.float().numpy()


def logits(model: LlamaForCausalLM) -> np.ndarray:
    return np.asarray(model(jnp.asarray(IDS.numpy())).logits, np.float32)


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Path]:
    """A base model and an adapter of its attention."""
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base", write_adapter(tmp_path, base, target_modules=ATTENTION)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(tmp_path: Path, name: str, tied: bool) -> None:
    base_model(tied).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path, base_model(tied), **CASES[name])
    expected = peft_logits(base_model(tied), adapter)
    loaded = load_model(tmp_path / "base", adapter=adapter)
    np.testing.assert_allclose(logits(loaded), expected, atol=2e-6)
    converted = convert.convert(tmp_path / "base", tmp_path / "out", adapter=adapter)
    np.testing.assert_array_equal(logits(load_model(converted)), logits(loaded))
    with torch.no_grad():
        by_torch = HFModel.from_pretrained(converted)(IDS).logits.numpy()
        unchanged = base_model(tied)(IDS).logits.numpy()
    np.testing.assert_allclose(by_torch, expected, atol=2e-6)
    assert np.abs(unchanged - expected).max() > 0.1


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    """The adapter brings both embeddings, with more rows than the base model's."""
    base_model().save_pretrained(tmp_path / "base")
    base = base_model()
    base.resize_token_embeddings(70, mean_resizing=False)
    adapter = write_adapter(tmp_path, base, embeddings=True, target_modules=ATTENTION)
    resized = base_model()
    resized.resize_token_embeddings(70, mean_resizing=False)
    expected = peft_logits(resized, adapter)
    todo = convert.plan(tmp_path / "base", tmp_path / "out", adapter=adapter)
    assert any("grows from 64 to 70" in note for note in todo.notes)
    loaded = load_model(tmp_path / "base", adapter=adapter)
    assert loaded.config.vocab_size == 70
    np.testing.assert_allclose(logits(loaded), expected, atol=2e-6)


def test_one_rounding(tmp_path: Path) -> None:
    """In bfloat16 each weight is the rounded sum, where PEFT rounds the product first."""
    base_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = base_model().to(torch.bfloat16)
    adapter = write_adapter(tmp_path, base, target_modules=ATTENTION, lora_alpha=4)
    todo = convert.plan(tmp_path / "base", tmp_path / "out", adapter=adapter)
    convert.conversion.run(todo)
    name = "model.layers.1.self_attn.q_proj"
    low = load_file(adapter / "adapter_model.safetensors")
    a, b = (low[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    weight = load_file(tmp_path / "base/model.safetensors")[f"{name}.weight"]
    merged = load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    exact = weight.double() + b @ a
    # a sum in float32 may be on the other side of a half
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.999
    assert todo.rounding is not None
    added = torch.cat([(exact - weight.double()).flatten()])
    error = (merged.double() - exact).flatten()
    assert 0 < todo.rounding.relative < 1
    assert todo.rounding.relative == pytest.approx(float(error.norm() / added.norm()), rel=0.5)
    wide = convert.convert(tmp_path / "base", tmp_path / "f32", adapter=adapter, dtype="float32")
    unrounded = load_file(wide / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(unrounded.double(), exact, rtol=1e-6, atol=1e-7)


def test_any_format(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    expected = logits(load_model(base, adapter=adapter))
    gguf = convert.convert(base, tmp_path / "base.gguf", tokenizer=False)
    merged = convert.convert(gguf, tmp_path / "merged", adapter=adapter)
    np.testing.assert_array_equal(logits(load_model(merged)), expected)
    orbax = convert.convert(base, tmp_path / "orbax", to="orbax")
    np.testing.assert_array_equal(logits(load_model(orbax, adapter=adapter)), expected)


def changed(adapter: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change adapter_config.json and the tensors."""
    file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    change(config, tensors)
    file.write_text(json.dumps(config))
    save_file(tensors, weights)


EMBEDDING = "base_model.model.model.embed_tokens"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(peft_type="IA3"), "peft_type: found 'IA3', expected 'LORA'"),
        (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "changes the base model too"),
        (
            lambda c, t: c.update(alora_invocation_tokens=[1]),
            "alora_invocation_tokens: cannot be merged",
        ),
        (lambda c, t: c.update(r=0), "r: found 0, expected a positive integer"),
        (lambda c, t: c.update(r=2), "found rank 4, expected 2, as adapter_config.json says"),
        (lambda c, t: c.update(rank_pattern={"(": 4}), r"'\(' is not a regular expression"),
        (lambda c, t: t.pop(A), "q_proj.weight: found lora_B without lora_A"),
        (
            lambda c, t: t.update({A: t[A][:, :5].contiguous()}),
            r"found LoRA of \[32, 5\], expected",
        ),
        (
            lambda c, t: t.update({A: t[A].to(torch.int32)}),
            "found dtype I32, expected floating point",
        ),
        (
            lambda c, t: t.update({"base_model.model.x.lora_C": t[A].clone()}),
            "x.lora_C: unexpected",
        ),
        (
            lambda c, t: t.update({A.replace("q_proj", "qkv"): t.pop(A)}),
            "qkv.weight: found lora_A without lora_B",
        ),
        (
            lambda c, t: t.update(
                {"base_model.model.model.layers.9.mlp.up_proj.weight": t[A].clone()}
            ),
            "is for another base model",
        ),
        (
            lambda c, t: c.update(modules_to_save=5),
            "modules_to_save: found 5, expected a list or null",
        ),
        (
            lambda c, t: (
                c.update(trainable_token_indices=[3]),
                t.update({f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.tensor(1.0)}),
            ),
            r"embed_tokens.weight: found trained rows \[\], expected 1",
        ),
        (lambda c, t: t.clear(), "found no tensors"),
    ],
)
def test_refusals(
    plain: tuple[Path, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    message: str,
) -> None:
    base, adapter = plain
    changed(adapter, change)
    for attempt in (
        lambda: load_model(base, adapter=adapter),
        lambda: convert.convert(base, tmp_path / "out", adapter=adapter),
    ):
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert str(adapter) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_adapter(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    with pytest.raises(ValueError, match=r"base: found no adapter_config\.json"):
        load_model(base, adapter=base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="load the adapter with peft and save it again"):
        load_model(base, adapter=adapter)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damage_is_an_error_of_one_line_or_goes_into_a_value(
    plain: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path, random.Random], str]
) -> None:
    base, adapter = plain
    rng, errors = random.Random(0), 0
    for case in range(50):
        copy = Path(shutil.copytree(adapter, tmp_path / f"adapter{case}"))
        file = rng.choice(["adapter_config.json", "adapter_model.safetensors"])
        what = damage(copy / file, rng)
        try:
            convert.convert(base, tmp_path / f"out{case}", adapter=copy, verify=False)
        except ValueError as error:
            errors += 1
            assert str(tmp_path) in str(error), what
    assert errors > (20 if damage is truncate else 5)
