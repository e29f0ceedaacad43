"""Weights read in slices: each device gets its part of what `huggingface.load` reads completely."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.checkpoints.huggingface import load_params
from llama_jax.checkpoints.safetensors_read import read_header, read_slice
from parity_tests.harness.child_process import output_lines
from train.options import RunOptions
from train.program.build import run_program

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(path)
    return path


def test_each_device_reads_its_part(directory):
    output_lines("workers.sharded_params", str(directory))


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    ends=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=3),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_any_slice_equals_numpys(tmp_path_factory, shape, ends, dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    path = tmp_path_factory.getbasetemp() / "slices.safetensors"
    save_file({"a": np.zeros(3, np.float32), "x": array}, path)
    (tensor,) = [tensor for tensor in read_header(path) if tensor.name == "x"]
    index = tuple(slice(*sorted(pair)) for pair in ends[: len(shape)])
    index = tuple(slice(*part.indices(n)) for part, n in zip(index, shape, strict=True))
    out = np.empty(array[index].shape, np.float32)
    assert read_slice(tensor, index, out)
    np.testing.assert_array_equal(out, array[index].astype(np.float32))


@pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
def test_problems_are_named(directory, tmp_path, damage):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = dict(load_file(directory / "model.safetensors"))
    if damage == "nan":
        tensors[name] = tensors[name].copy()
        tensors[name][3, 4] = np.nan
    elif damage == "shape":
        tensors[name] = tensors[name][1:].copy()
    else:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    program = run_program(RunOptions(), CONFIG)
    with pytest.raises(ValueError) as caught:
        load_params(LlamaForCausalLM, tmp_path, program.params)
    assert name in str(caught.value)
