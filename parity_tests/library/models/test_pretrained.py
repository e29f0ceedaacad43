"""The dtype under all of its names, and keywords that mean nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

# of the heads that the directory has not
pytestmark = pytest.mark.filterwarnings("ignore:.*randomly initialized")

TINY = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    LlamaForCausalLM(TINY, rngs=nnx.Rngs(0)).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, "float32"),
        ("auto", "float32"),
        ("bfloat16", "bfloat16"),
        ("torch.float16", "float16"),
        (torch.bfloat16, "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (np.float16, "float16"),
        (np.dtype(np.float32), "float32"),
    ],
    ids=str,
)
def test_the_dtype_under_both_of_its_names(directory, name, asked, expected):
    assert LlamaForCausalLM.from_pretrained(directory, **{name: asked}).dtype == expected


def test_two_dtypes(directory):
    load = LlamaForTokenClassification.from_pretrained
    assert (
        load(directory, dtype=jnp.bfloat16, torch_dtype=torch.bfloat16).model.dtype == jnp.bfloat16
    )
    with pytest.raises(ValueError, match="found float32 beside torch_dtype bfloat16"):
        load(directory, dtype="float32", torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype: found 'int9'"):
        load(directory, torch_dtype="int9")


@pytest.mark.parametrize("model", [LlamaForCausalLM, LlamaForTokenClassification])
def test_keywords_that_are_no_fields_are_named(directory, model):
    with pytest.raises(TypeError, match="device_map, trust_remote_code: unknown keyword"):
        model.from_pretrained(directory, trust_remote_code=True, device_map="auto")
    with pytest.raises(TypeError, match="extra_fields"):
        LlamaConfig.from_pretrained(directory, extra_fields={})
    changed = model.from_pretrained(directory, max_position_embeddings=np.int64(32), rope_theta=1e4)
    assert changed.config.max_position_embeddings == 32
    with pytest.raises(ValueError, match=r"rngs: found 0, expected flax.nnx.Rngs"):
        model.from_pretrained(directory, rngs=0)


def test_other_keywords_that_mean_nothing(directory):
    model = LlamaForCausalLM.from_pretrained(directory)
    ids = np.ones((1, 2), np.int32)
    for call in (
        lambda: model.generate(ids, max_new_tokens=1, num_beams=1),
        lambda: model.save_pretrained(directory, safe_serialization=True),
        lambda: LlamaConfig(rope_theta=1e4),
        lambda: model(ids, use_cache=True),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()
