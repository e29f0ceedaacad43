"""Flax's files, as transformers 4 and EasyLM write them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file

import convert
from convert.formats.flax.leaves import find_leaves
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.convert.test_damage import truncate

Tensors = dict[str, np.ndarray]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A Hugging Face directory, with more query heads than key heads."""
    tiny_model(tie_word_embeddings=request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tensors_of(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


def flax_tree(tensors: Tensors) -> dict[str, Any]:
    """The parameters of transformers' FlaxLlamaForCausalLM."""
    leaves = {}
    for name, values in tensors.items():
        *path, kind = name.split(".")
        if path[-1] == "embed_tokens":
            kind = "embedding"
        elif values.ndim == 2:
            kind, values = "kernel", np.ascontiguousarray(values.T)
        leaves[(*path, kind)] = values
    tree: dict[str, Any] = traverse_util.unflatten_dict(leaves)
    return tree


def easylm_leaves(tensors: Tensors, config: dict[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
    """The parameters of EasyLM's FlaxLLaMAForCausalLM, whose RoPE pairs neighbors."""
    places = {
        "self_attn.q_proj": ("attention", "wq"),
        "self_attn.k_proj": ("attention", "wk"),
        "self_attn.v_proj": ("attention", "wv"),
        "self_attn.o_proj": ("attention", "wo"),
        "mlp.gate_proj": ("feed_forward", "w1"),
        "mlp.down_proj": ("feed_forward", "w2"),
        "mlp.up_proj": ("feed_forward", "w3"),
        "input_layernorm": ("attention_norm",),
        "post_attention_layernorm": ("ffn_norm",),
    }
    leaves = {}
    for name, values in tensors.items():
        if name == "model.embed_tokens.weight":
            leaves["transformer", "wte", "embedding"] = values
        elif name == "model.norm.weight":
            leaves["transformer", "ln_f", "kernel"] = values
        elif name == "lm_head.weight":
            leaves["lm_head", "kernel"] = values.T
        else:
            _, _, number, module, *rest = name.split(".")
            inner = ".".join((module, *rest[:-1]))
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config[
                    "num_attention_heads" if inner.endswith("q_proj") else "num_key_value_heads"
                ]
                rows, columns = values.shape
                halves = values.reshape(heads, 2, rows // heads // 2, columns)
                values = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows, columns)
            leaves["transformer", "h", number, *places[inner], "kernel"] = values.T
    return {("params", *path): np.ascontiguousarray(each) for path, each in leaves.items()}


def write_flax(model: Path, directory: Path) -> Path:
    directory.mkdir()
    tree = flax_tree(tensors_of(model))
    (directory / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    return directory


def write_shards(model: Path, directory: Path) -> Path:
    directory.mkdir()
    leaves = traverse_util.flatten_dict(flax_tree(tensors_of(model)), sep="/")
    names = sorted(leaves)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"flax_model-{number:05d}-of-00002.msgpack"
        tree = traverse_util.unflatten_dict({name: leaves[name] for name in part}, sep="/")
        (directory / file).write_bytes(serialization.to_bytes(tree))
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    return directory


def write_easylm(model: Path, directory: Path, state: bool = False) -> Path:
    directory.mkdir()
    config = json.loads((model / "config.json").read_text())
    leaves: dict[tuple[str, ...], Any] = easylm_leaves(tensors_of(model), config)
    if state:
        moments = {("opt_state", "0", "mu", *path[1:]): values for path, values in leaves.items()}
        leaves = {("params", *path): values for path, values in leaves.items()} | moments
        leaves["step",] = np.int32(7)
    packer = msgpack.Packer()
    name = "streaming_train_state" if state else "streaming_params_500"
    with (directory / name).open("wb") as file:
        for path, values in leaves.items():
            file.write(packer.pack((path, serialization.to_bytes(values))))
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    return directory


def write_easylm_state(model: Path, directory: Path) -> Path:
    return write_easylm(model, directory, state=True)


WRITERS = [write_flax, write_shards, write_easylm, write_easylm_state]


@pytest.mark.parametrize("write", WRITERS)
def test_every_tensor_bit_for_bit(
    model: Path, tmp_path: Path, write: Callable[[Path, Path], Path]
) -> None:
    converted = convert.convert(write(model, tmp_path / "flax"), tmp_path / "out")
    expected, actual = tensors_of(model), tensors_of(converted)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_other_dtypes(model: Path, tmp_path: Path, dtype: type) -> None:
    source = tmp_path / "flax"
    source.mkdir()
    cast = {name: values.astype(dtype) for name, values in tensors_of(model).items()}
    (source / "flax_model.msgpack").write_bytes(serialization.to_bytes(flax_tree(cast)))
    (source / "config.json").write_bytes((model / "config.json").read_bytes())
    converted = convert.convert(source, tmp_path / "out")
    for name, values in tensors_of(converted).items():
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, cast[name])


def test_arrays_in_pieces(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flax cuts arrays of more than 1 GiB."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    source = write_flax(model, tmp_path / "flax")
    assert b"__msgpack_chunked_array__" in (source / "flax_model.msgpack").read_bytes()
    converted = convert.convert(source, tmp_path / "out")
    for name, values in tensors_of(model).items():
        np.testing.assert_array_equal(tensors_of(converted)[name], values)


def test_a_tied_head_that_is_stored_too(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    if not config["tie_word_embeddings"]:
        pytest.skip("of a tied model")
    tensors = tensors_of(model)
    source = write_flax(model, tmp_path / "flax")
    for changed in (False, True):
        head = tensors["model.embed_tokens.weight"] + np.float32(changed)
        tree = flax_tree(tensors | {"lm_head.weight": head})
        (source / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
        info = convert.info(source)
        if changed:
            assert "lm_head/kernel: differs from the embedding" in info["problems"][0]
        else:
            assert any("the head is tied" in note for note in info["notes"])


def test_the_file_itself(model: Path, tmp_path: Path) -> None:
    source = write_easylm(model, tmp_path / "easylm")
    info = convert.info(source / "streaming_params_500")
    assert (info["format"], info["problems"]) == ("EasyLM", [])


def test_refusals(model: Path, tmp_path: Path) -> None:
    source = write_flax(model, tmp_path / "flax")
    file = source / "flax_model.msgpack"
    tree = serialization.msgpack_restore(file.read_bytes())

    def error(changed: dict[str, Any]) -> str:
        file.write_bytes(serialization.to_bytes(changed))
        with pytest.raises(ValueError) as caught:
            convert.plan(source, tmp_path / "out")
        assert "\n" not in str(caught.value).split(" problems")[0]
        return str(caught.value)

    leaves = traverse_util.flatten_dict(tree, sep="/")
    norm = "model/norm/weight"
    without = {name: values for name, values in leaves.items() if name != norm}
    unflat = traverse_util.unflatten_dict
    assert f"{norm}: missing" in error(unflat(without, sep="/"))
    longer = {norm: np.zeros(3, np.float32)}
    assert f"{norm}: found shape [3], expected" in error(unflat(leaves | longer, sep="/"))
    whole = {norm: leaves[norm].astype(np.int32)}
    assert f"{norm}: found int32, expected a floating-point" in error(
        unflat(leaves | whole, sep="/")
    )
    more = {"model/extra/kernel": leaves[norm]}
    assert "model/extra/kernel: unexpected" in error(unflat(leaves | more, sep="/"))
    infinite = {norm: np.full_like(leaves[norm], np.inf)}
    file.write_bytes(serialization.to_bytes(unflat(leaves | infinite, sep="/")))
    with pytest.raises(ValueError, match=r"model/norm/weight: found NaN or infinity"):
        convert.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match="do not tell the number of heads"):
        convert.plan(source, tmp_path / "out")


def flip_structure(path: Path, rng: random.Random) -> str:
    """Change a bit outside the numbers: Flax's files have no checksums, a flipped number is a number."""
    content = bytearray(path.read_bytes())
    numbers = {
        place
        for leaf in find_leaves(path).values()
        for begin, size in leaf.parts
        for place in range(begin, begin + size)
    }
    where = rng.choice(sorted(set(range(len(content))) - numbers))
    content[where] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name} flipped at {where}"


@pytest.mark.parametrize("damage", [truncate, flip_structure])
@pytest.mark.parametrize("write", [write_flax, write_easylm_state])
def test_damage_is_an_error_of_one_line(
    tmp_path: Path,
    write: Callable[[Path, Path], Path],
    damage: Callable[[Path, random.Random], str],
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    source = write(tmp_path / "model", tmp_path / "flax")
    (file,) = (path for path in source.iterdir() if path.name != "config.json")
    content, rng, errors = file.read_bytes(), random.Random(0), 0
    for case in range(100):
        file.write_bytes(content)
        what = damage(file, rng)
        try:
            convert.convert(source, tmp_path / f"out{case}", verify=False)
        except ValueError as error:
            errors += 1
            assert str(tmp_path) in str(error), what
            assert not (tmp_path / f"out{case}").exists()
    assert errors > (90 if write is write_flax else 30)  # of a train state, moments are not read
