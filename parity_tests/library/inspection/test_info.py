"""FLOPs, bytes and shapes of `info` against the compiled program and the model."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM, init_cache
from llama_jax.inspection.architecture import (
    cache_bytes_per_token,
    data_flow,
    forward_flops_per_token,
)

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_the_matmuls_in_the_program(tied):
    fields = CONFIG.to_dict() | {"tie_word_embeddings": tied}
    config = LlamaConfig.from_dict(fields)
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0)))
    seq = 64
    jaxpr = jax.make_jaxpr(lambda m, ids: m(ids).logits)(
        model, jax.ShapeDtypeStruct((1, seq), jnp.int32)
    )
    # the program multiplies the masked half of the attention too; the count leaves it out
    width = config.num_attention_heads * config.head_size
    masked = 2 * config.num_hidden_layers * width * (seq - 1) * seq
    assert dot_flops(jaxpr.jaxpr) == forward_flops_per_token(config, seq) * seq + masked


def dot_flops(jaxpr) -> int:
    """2 * multiply-adds of every dot_general, scans multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            times = equation.params.get("length", 1)
            total += times * dot_flops(getattr(inner, "jaxpr", inner))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
    return total


def test_cache_bytes_are_those_of_the_cache():
    cache = init_cache(CONFIG, 3, 7, jnp.bfloat16)
    assert cache.keys.nbytes + cache.values.nbytes == cache_bytes_per_token(CONFIG, 2) * 3 * 7


def test_the_data_flow_ends_in_the_logits():
    model = nnx.eval_shape(lambda: LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    logits = jax.eval_shape(lambda m, ids: m(ids).logits, model, ids)
    assert data_flow(CONFIG, 2, 5)[-1] == ("lm_head", logits.shape)
