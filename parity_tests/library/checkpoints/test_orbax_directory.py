"""Loading models from Orbax directories."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from llama_jax import LlamaForCausalLM
from llama_jax.__main__ import main
from llama_jax.load import load_model, tokenizer_directory
from llama_jax.text.tokenizer import load_tokenizer
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_model
from parity_tests.train.conftest import finished, tiny  # noqa: F401

# Orbax leaves the other arrays' reads unfinished where one fails
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_garbage() -> Iterator[None]:
    yield
    gc.collect()


def require_same(one: LlamaForCausalLM, other: LlamaForCausalLM) -> None:
    """The same parameters, bit for bit, and a program that runs."""
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.generation_config == other.generation_config
    ids = jnp.asarray([[1, 5, 9]])
    np.testing.assert_array_equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converted_weights(tmp_path: Path, dtype: str | None) -> None:
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    model = load_model(tmp_path / "orbax", dtype)
    assert model.dtype == jnp.dtype(dtype or "float32")
    require_same(model, LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype))


def test_dtypes_are_those_of_a_hugging_face_directory(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "orbax", to="orbax", dtype="bfloat16")
    for dtype, expected in [
        ("auto", "bfloat16"),
        ("torch.float16", "float16"),
        ("half", "float16"),
    ]:
        assert load_model(tmp_path / "orbax", dtype).dtype == jnp.dtype(expected)
    for dtype in ("int8", "bf16", "bool", 5, "float64"):
        with pytest.raises(ValueError) as theirs:
            load_model(tmp_path / "hf", dtype)
        with pytest.raises(ValueError) as ours:
            load_model(tmp_path / "orbax", dtype)
        assert str(ours.value) == str(theirs.value)
        assert str(ours.value).startswith("dtype: found ")
    convert.convert(tmp_path / "hf", tmp_path / "wide", to="orbax", dtype="float64")
    with pytest.raises(
        ValueError, match=r"^dtype: found float64, expected jax_enable_x64 to be on"
    ):
        load_model(tmp_path / "wide")
    assert load_model(tmp_path / "wide", "float32").dtype == jnp.float32
    with pytest.raises(ValueError, match=r"an Orbax directory; load it with .*load_model"):
        LlamaForCausalLM.from_pretrained(tmp_path / "orbax")
    with pytest.raises(ValueError, match="a file; give the directory that it is in"):
        load_model(tmp_path / "hf" / "model.safetensors")


def test_a_run_and_one_of_its_steps(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    convert.convert(finished, tmp_path / "hf")
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    newest = max(int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit())
    require_same(load_model(finished), expected)
    require_same(load_model(finished / "checkpoints" / str(newest)), expected)
    assert load_tokenizer(tokenizer_directory(finished)).get_vocab_size() > 0


def test_every_command_accepts_a_run(finished: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    step = max(path for path in (finished / "checkpoints").iterdir() if path.name.isdigit())
    for model in map(str, (finished, step)):
        out = str(tmp_path / Path(model).name)
        for command in (
            ["score", "--model", model, "--text", "def f(x):"],
            ["mask", "--model", model, "--text", "def f(x):"],
            ["quantize", "--model", model, "--out", out],
            ["generate", "--model", out, "--prompt", "def", "--max-new-tokens", "2"],
        ):
            assert main(command) == 0, capsys.readouterr().err


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    chunk = next((tmp_path / "orbax/params/model.norm.weight").glob("0*"))
    chunk.write_bytes(chunk.read_bytes()[:7])
    with pytest.raises(ValueError, match="not a checkpoint of this model") as caught:
        load_model(tmp_path / "orbax")
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "orbax/params")
    (tmp_path / "orbax/checkpoints").mkdir()
    with pytest.raises(ValueError, match="found no checkpoint, expected one"):
        load_model(tmp_path / "orbax")


def test_a_config_of_another_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "orbax", to="orbax")
    tiny_model(hidden_size=64).config.save_pretrained(tmp_path / "orbax")
    with pytest.raises(ValueError, match="not a checkpoint of this model"):
        load_model(tmp_path / "orbax")
