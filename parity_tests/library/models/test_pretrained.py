"""The names of the dtype argument, and unknown keywords."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

# task heads that the checkpoint lacks
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
    ("dtype", "expected"),
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
def test_dtype_under_both_names(directory, name, dtype, expected):
    assert LlamaForCausalLM.from_pretrained(directory, **{name: dtype}).dtype == expected


def test_dtype_and_torch_dtype_must_agree(directory):
    load = LlamaForTokenClassification.from_pretrained
    assert (
        load(directory, dtype=jnp.bfloat16, torch_dtype=torch.bfloat16).model.dtype == jnp.bfloat16
    )
    with pytest.raises(ValueError, match="found float32 and torch_dtype bfloat16"):
        load(directory, dtype="float32", torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype: found 'int9'"):
        load(directory, torch_dtype="int9")


@pytest.mark.parametrize("model", [LlamaForCausalLM, LlamaForTokenClassification])
def test_unknown_config_fields_are_named(directory, model):
    with pytest.raises(TypeError, match="device_map, trust_remote_code: unknown keyword"):
        model.from_pretrained(directory, trust_remote_code=True, device_map="auto")
    with pytest.raises(TypeError, match="extra_fields"):
        LlamaConfig.from_pretrained(directory, extra_fields={})
    changed = model.from_pretrained(directory, max_position_embeddings=np.int64(32), rope_theta=1e4)
    assert changed.config.max_position_embeddings == 32
    with pytest.raises(ValueError, match=r"rngs: found 0, expected flax.nnx.Rngs"):
        model.from_pretrained(directory, rngs=0)


def test_unknown_keywords_are_type_errors(directory):
    model = LlamaForCausalLM.from_pretrained(directory)
    ids = np.ones((1, 2), np.int32)
    for call in (
        lambda: model.generate(ids, max_new_tokens=1, num_beams=1),
        lambda: model.stream(ids, max_new_tokens=1, output_scores=True),
        lambda: model.save_pretrained(directory, safe_serialization=True),
        lambda: LlamaConfig(rope_theta=1e4),
        lambda: model(ids, use_cache=True),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()
