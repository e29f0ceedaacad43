"""Orbax checkpoints of other programs, read through a map of names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import convert
from convert.__main__ import main
from convert.formats.registry import recognize
from convert.formats.trees.locate import find_tree
from convert.formats.trees.name_map import evaluate, read_name_map
from convert.formats.trees.scaling import scaled, unscaled
from llama_jax import LlamaConfig
from llama_jax.files.foreign_weights import describe
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.convert.formats.maxtext.test_maxtext import (
    SIZES,
    error_of,
    require_same,
    tensors_of,
    with_config,
)
from parity_tests.convert.formats.maxtext.tiny_maxtext import Tensors, save
from parity_tests.harness.child_process import ROOT


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model = tiny_model(tie_word_embeddings=False, **SIZES)
    model.save_pretrained(tmp_path / "model")
    return model


def documented_map(folder: Path) -> Path:
    """The example of docs/conversion.md."""
    text = (ROOT / "docs/conversion.md").read_text()
    (example,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (folder / "names.toml").write_text(example)
    return folder / "names.toml"


def documented_tree(tensors: Tensors) -> dict[str, Any]:
    """What the documented trainer saves."""
    leaves: dict[str, Any] = {"step": np.int32(3)}
    for name, values in tensors.items():
        path = name.removesuffix(".weight").removeprefix("model.").replace(".", "/")
        path = re.sub(r"layers/(\d+)", r"layers_\1", path)
        path = re.sub(r"self_attn/(.)_proj", r"attention/\1", path)
        path = re.sub(r"(gate|up|down)_proj", r"\1", path)
        path = re.sub(r"_layernorm", "_norm", path)
        path = path.replace("embed_tokens", "embed/embedding").replace("lm_head", "head")
        if values.ndim == 1:
            path += "/scale"
        elif "embed" not in path:
            path, values = f"{path}/kernel", values.T
        leaves[f"params/{path}"] = np.ascontiguousarray(values)
        leaves[f"opt_state/mu/{path}"] = np.zeros(2, np.float32)
    return leaves


def test_the_documented_example(model: Any, tmp_path: Path) -> None:
    expected = tensors_of(tmp_path / "model")
    source = tmp_path / "run"
    save(documented_tree(expected), source / "checkpoints/100/default")
    with_config(source, tmp_path / "model")
    names = documented_map(tmp_path)
    assert main([str(source), str(tmp_path / "out"), "--map", str(names)]) == 0
    require_same(tmp_path / "out", expected)
    assert main(["info", str(source), "--map", str(names)]) == 0
    for file in (names, f"file://{names}"):
        assert convert.info(source, name_map=file)["format"] == "my trainer"
    assert "--map FILE" in error_of(source, tmp_path / "none")


def stacked_tree(tensors: Tensors) -> dict[str, Any]:
    """Layers on the first axis, heads in groups, pairs of rotated rows, one projection divided by 8."""
    layers = SIZES["num_hidden_layers"]

    def stack(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{i}.{name}.weight"] for i in range(layers)])

    def interleaved(values: np.ndarray) -> np.ndarray:
        """The rows of heads [..., D, E], whose halves RoPE pairs, beside each other."""
        return np.stack(np.split(values, 2, axis=-2), axis=-2).reshape(values.shape)

    queries = stack("self_attn.q_proj").reshape(layers, 2, 2, 16, 32)  # [L, K, G, D, E]
    keys = stack("self_attn.k_proj").reshape(layers, 2, 16, 32)
    output = stack("self_attn.o_proj").reshape(layers, 32, 4, 16)
    return {
        "q": np.moveaxis(interleaved(queries), 2, 1),  # [L, G, K, D, E]
        "k": interleaved(keys),
        "v": stack("self_attn.v_proj").transpose(0, 2, 1),
        "o": output.transpose(0, 3, 2, 1).reshape(layers, 64, 32),  # rows of D * H
        "gate": stack("mlp.gate_proj") / 8,
        "up": stack("mlp.up_proj"),
        "down": stack("mlp.down_proj"),
        "norm1": stack("input_layernorm"),
        "norm2": stack("post_attention_layernorm"),
        "embed": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "head": tensors["lm_head.weight"],
    }


STACKED = """
[[tensor]]
array = 'q'
name = 'model.layers.{layer}.self_attn.q_proj.weight'
layer_axis = 0
shape = ['num_attention_heads / num_key_value_heads', 'num_key_value_heads', 'head_dim', 'hidden_size']
transpose = [1, 0, 2, 3]

[[tensor]]
array = 'k'
name = 'model.layers.{layer}.self_attn.k_proj.weight'
layer_axis = 0
shape = ['num_key_value_heads', 'head_dim', 'hidden_size']

[[tensor]]
array = 'v'
name = 'model.layers.{layer}.self_attn.v_proj.weight'
layer_axis = 0
transpose = [1, 0]

[[tensor]]
array = 'o'
name = 'model.layers.{layer}.self_attn.o_proj.weight'
layer_axis = 0
shape = ['head_dim * num_attention_heads', 'hidden_size']
reshape = ['head_dim', 'num_attention_heads', 'hidden_size']
transpose = [2, 1, 0]

[[tensor]]
array = 'gate'
name = 'model.layers.{layer}.mlp.gate_proj.weight'
layer_axis = 0
scale = 8

[[tensor]]
array = '(?P<which>up|down)'
name = 'model.layers.{layer}.mlp.{which}_proj.weight'
layer_axis = 0

[[tensor]]
array = 'norm1'
name = 'model.layers.{layer}.input_layernorm.weight'
layer_axis = 0

[[tensor]]
array = 'norm2'
name = 'model.layers.{layer}.post_attention_layernorm.weight'
layer_axis = 0

[[tensor]]
array = 'embed'
name = 'model.embed_tokens.weight'

[[tensor]]
array = 'norm'
name = 'model.norm.weight'

[[tensor]]
array = 'head'
name = 'lm_head.weight'
"""


@pytest.mark.parametrize("chunk_bytes", [None, 700])
def test_reshaped_permuted_and_scaled(model: Any, tmp_path: Path, chunk_bytes: int | None) -> None:
    expected = tensors_of(tmp_path / "model")
    source = save(stacked_tree(expected), tmp_path / "tree", chunk_byte_size=chunk_bytes)
    with_config(source, tmp_path / "model")
    names = tmp_path / "names.toml"
    names.write_text(STACKED)
    assert "add --rope halves" in error_of(source, tmp_path / "out", name_map=names)
    out = convert.convert(source, tmp_path / "out", name_map=names, rope="pairs")
    require_same(out, expected)
    names.write_text(f'rope = "pairs"\n{STACKED}')
    require_same(convert.convert(source, tmp_path / "told", name_map=names), expected)
    message = error_of(source, tmp_path / "none", name_map=names, rope="halves")
    assert "rope: found halves, but the map says pairs" in message


RULE = "[[tensor]]\narray = 'a'\nname = 'b'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no table \[\[tensor\]\]"),
        ("[tensor]\narray = 'a'", r"has no table \[\[tensor\]\]"),
        ("tensor = [1]", "tensor 1: found 1, expected a table"),
        ("= 3", "not valid TOML"),
        ("[[tensor]]\narray = 'a'", r"tensor 1 \(a\): name: found None, expected a text"),
        ("[[tensor]]\narray = '('\nname = 'b'", r"tensor 1 \(\(\): found '\(', expected a regular"),
        (RULE + "shard = 1", r"tensor 1 \(a\): found shard, expected one of array, name, layer"),
        (RULE + "layer_axis = -1", "layer_axis: found -1, expected the number of an axis"),
        (RULE + "layer_axis = 0", r"name: has no \{layer\}, but there is a layer_axis"),
        (RULE + "transpose = [1, 1]", r"transpose: found \[1, 1\], expected all axes"),
        (RULE + "transpose = 1", "transpose: found 1, expected all axes"),
        (RULE + "shape = 'x'", "shape: found 'x', expected a list"),
        (RULE + "shape = ['heads']", "shape: found 'heads', expected an expression of numbers"),
        (RULE + "shape = [2]\ntranspose = [1, 0]", r"transpose: found \[1, 0\], expected 1 axes"),
        (RULE + "scale = '__import__(\"os\")'", "scale: found .*expected an expression"),
        (RULE + "scale = '1 / 0'", "scale: found '1 / 0', expected an expression"),
        (RULE + "scale = 0", "scale: found 0, expected no zero"),
        (RULE + "scale = true", "scale: found True, expected a number"),
        ("[[tensor]]\narray = 'a'\nname = '{layer}'", r"name: found \{layer\}, expected a group"),
        ("[[tensor]]\narray = 'a'\nname = '{x}'", r"name: found \{x\}, expected a group"),
        ("rope = 'both'\n" + RULE, "rope: found 'both', expected halves or pairs"),
        ("strip = ['(']\n" + RULE, "expected a regular expression"),
        ("strip = 'a'\n" + RULE, "strip: found 'a', expected a list of regular expressions"),
        ("titel = 'a'\n" + RULE, "found titel, expected one of tensor, title"),
    ],
)
def test_mistakes_in_a_map(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_name_map(tmp_path / "names.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'names.toml'}: ")
    assert "\n" not in str(caught.value)


def test_refusals(model: Any, tmp_path: Path) -> None:
    names, out = documented_map(tmp_path), tmp_path / "out"
    source = save(documented_tree(tensors_of(tmp_path / "model")), tmp_path / "tree")
    assert "found no config.json" in error_of(source, out, name_map=names)
    with_config(source, tmp_path / "model")
    assert "none.toml: cannot be read" in error_of(source, out, name_map=tmp_path / "none.toml")
    assert "found no Orbax checkpoint" in error_of(tmp_path / "model", out, name_map=names)
    text = names.read_text()
    names.write_text(text.replace("'lm_head.weight'", "'model.embed_tokens.weight'"))
    message = error_of(source, out, name_map=names)
    assert "is mapped to model.embed_tokens.weight, as" in message
    assert "lm_head.weight: missing, no array is mapped to it" in message
    names.write_text(text.replace("'lm_head.weight'", "'model.head.weight'"))
    assert "model.head.weight, which a model of this config.json does not have" in error_of(
        source, out, name_map=names
    )
    config = source / "config.json"
    config.write_text(config.read_text().replace('embeddings": false', 'embeddings": true'))
    names.write_text(text)
    assert "tie_word_embeddings is true; set it to false" in error_of(source, out, name_map=names)


def test_expressions() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    assert evaluate("sqrt(head_dim) * 2 - 1", config) == 7.0
    assert evaluate("hidden_size / num_attention_heads", config) == 16.0
    for text in ("head_dim ** 2", "open('x')", "head_dim.real", "True", "", "x", "1" * 5000):
        with pytest.raises(ValueError, match="expected an expression"):
            evaluate(text, config)


@pytest.mark.parametrize("factor", [np.sqrt(8.0), np.sqrt(128.0), 0.3, 1 / 64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_scaling_is_undone_exactly(dtype: str, factor: float) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    generator = np.random.default_rng(0)
    values = (
        generator.standard_normal(100_000) * 2.0 ** generator.integers(-3, 4, 100_000)
    ).astype(kind)
    read = scaled(values, factor)
    np.testing.assert_array_equal(scaled(unscaled(read, factor), factor), read)


def test_the_tree_of_a_run_is_found(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoints/{step}/state").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step}/state/_METADATA").touch()
    expected = tmp_path / "checkpoints/10/state"
    assert find_tree(tmp_path) == find_tree(tmp_path / "checkpoints") == expected
    (tmp_path / "checkpoints/11").mkdir()  # not finished
    assert find_tree(tmp_path) == expected
    for name in ("a", "b"):
        (tmp_path / f"two/{name}").mkdir(parents=True)
        (tmp_path / f"two/{name}/_METADATA").touch()
    with pytest.raises(ValueError, match="found the trees a, b; give one of them"):
        find_tree(tmp_path / "two")


def test_a_tree_of_another_program_needs_a_map(tmp_path: Path) -> None:
    tree = tmp_path / "checkpoints/10/state"
    tree.mkdir(parents=True)
    (tree / "_METADATA").write_text('{"tree_metadata": {}}')
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tree):
        with pytest.raises(
            ValueError, match=r"10/state: an Orbax tree .* give them with --map FILE"
        ):
            recognize(path)
        assert "an Orbax checkpoint of another program" in describe(path)
