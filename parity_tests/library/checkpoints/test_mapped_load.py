"""Parameters that are mapped from files instead of read: the same model, and the files stay as they are."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from llama_jax import LlamaConfig, LlamaForCausalLM, quantize
from llama_jax.checkpoints import huggingface

# matrices are complete pages, norms and biases are not
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    attention_bias=True,
)


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Small models are mapped as well; the parts of each array that is."""
    calls: list[Any] = []
    map_parts = huggingface.map_parts

    def recorded(parts: Any) -> Any:
        calls.append(parts)
        return map_parts(parts)

    monkeypatch.setattr(huggingface, "_MAPPED_FROM", 0)
    monkeypatch.setattr(huggingface, "_MAPPED_TENSOR", 1)
    monkeypatch.setattr(huggingface, "map_parts", recorded)
    return calls


def random_model(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0), **fields)


def values(model: LlamaForCausalLM) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_a_model_whose_matrices_are_mapped(
    tmp_path: Path, mapped: list[Any], shard_size: str
) -> None:
    model = random_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    # embedding and head, four projections of attention and three of the MLP in each of three layers
    assert sorted(len(parts) for parts in mapped) == [1, 1, *[3] * 7]
    jax.tree.map(np.testing.assert_array_equal, values(loaded), values(model))
    # the buffers are given to a program that writes into them
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))]
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m), donate_argnums=0)(loaded)
    jax.tree.map(np.testing.assert_array_equal, values(doubled), [2 * x for x in values(model)])
    assert before == [path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))]
    # a new save replaces the files of a model that is in use
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    doubled.save_pretrained(tmp_path, max_shard_size=shard_size)
    jax.tree.map(np.testing.assert_array_equal, values(again), values(model))


def test_codes_are_mapped(tmp_path: Path, mapped: list[Any]) -> None:
    model = quantize(random_model(), 8)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert mapped
    jax.tree.map(np.testing.assert_array_equal, values(loaded), values(model))


def test_another_dtype_is_read(tmp_path: Path, mapped: list[Any]) -> None:
    random_model().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert not mapped
    assert loaded.dtype == jnp.bfloat16


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    found = load_file(file)[name].tobytes()
    infinite = np.frombuffer(found, np.float32).copy()
    infinite[77] = np.inf
    content = file.read_bytes()
    assert content.count(found) == 1
    file.write_bytes(content.replace(found, infinite.tobytes()))
    with pytest.raises(ValueError, match=f"{name}: holds non-finite values as float32"):
        LlamaForCausalLM.from_pretrained(tmp_path)
