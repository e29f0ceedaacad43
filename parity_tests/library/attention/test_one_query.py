"""Attention of a decoding step on a CPU, by the kernel that reads the cache where it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.attention import one_query
from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.one_query import one_query_attention
from llama_jax.generation import loop
from llama_jax.generation.sampling import Sampling
from llama_jax.generation.unstacked import unstack_layers
from parity_tests.reference.errors import rms_error
from parity_tests.reference.tolerances import ROUNDING_RATIO

ROWS, CAPACITY = 3, 70
# heads, kv_heads, dim
SHAPES = [(9, 3, 64), (4, 4, 32), (8, 1, 41), (2, 1, 128), (1, 1, 2)]


def case(shape: tuple[int, int, int], dtype: jnp.dtype) -> tuple[list[jax.Array], np.ndarray]:
    """Query, keys and values, and which keys each row sees: the used slots, without padding."""
    heads, kv_heads, dim = shape
    rng = np.random.default_rng(0)
    sizes = ((1, heads), (CAPACITY, kv_heads), (CAPACITY, kv_heads))
    arrays = [jnp.asarray(rng.standard_normal((ROWS, *size, dim)), dtype) for size in sizes]
    visible = np.arange(CAPACITY) < 50
    visible = np.broadcast_to(visible, (ROWS, CAPACITY)).copy()
    visible[1, :7] = visible[2, 20:23] = False
    return arrays, visible


def mask_of(visible: np.ndarray) -> AttentionMask:
    slots = jnp.arange(CAPACITY, dtype=jnp.int32)
    return AttentionMask(jnp.full(1, 49, jnp.int32), slots, jnp.asarray(visible))


def reference(arrays: list[jax.Array], visible: np.ndarray) -> np.ndarray:
    """The formula in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in arrays)
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(visible[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_rounds_no_more_than_torch(dtype, shape):
    arrays, visible = case(shape, dtype)
    out = jax.jit(one_query_attention)(*arrays, mask_of(visible))
    of_torch = getattr(torch, jnp.dtype(dtype).name)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(np.array(x, np.float32)).to(of_torch).transpose(1, 2) for x in arrays),
        attn_mask=torch.from_numpy(visible)[:, None, None],
        enable_gqa=True,
    )
    expected = reference(arrays, visible)
    assert out.dtype == dtype
    error = rms_error(theirs.transpose(1, 2).float().numpy(), expected)
    assert rms_error(out, expected) <= ROUNDING_RATIO * error


def test_a_query_that_sees_nothing_yields_zeros():
    arrays, visible = case(SHAPES[0], jnp.float32)
    visible[1] = False
    out = one_query_attention(*arrays, mask_of(visible))
    assert not out[1].any()
    assert out[0].all()


def test_slots_that_are_not_in_use_are_not_read():
    arrays, visible = case(SHAPES[0], jnp.float32)
    expected = one_query_attention(*arrays, mask_of(visible))
    unused = [x.at[:, 50:].set(jnp.nan) for x in arrays[1:]]
    np.testing.assert_array_equal(
        one_query_attention(arrays[0], *unused, mask_of(visible)), expected
    )


def test_nan_stays_in_its_row_and_head():
    arrays, visible = case(SHAPES[0], jnp.float32)
    arrays[1] = arrays[1].at[0, 3, 1].set(jnp.nan)
    out = np.isnan(one_query_attention(*arrays, mask_of(visible)))
    assert out[0, 0, 3:6].all()
    assert out.sum() == 3 * 64


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_derivatives_are_those_of_the_formula(dtype):
    arrays, visible = case(SHAPES[1], dtype)
    mask = mask_of(visible)
    rng = np.random.default_rng(1)
    cotangent = jnp.asarray(rng.standard_normal(arrays[0].shape), dtype)

    def run(implementation):
        return jax.vjp(lambda *a: attention(*a, mask, implementation=implementation)[0], *arrays)

    (out, backward), (plain, plain_backward) = run(None), run("plain")
    tolerance = 2e-6 if dtype == jnp.float32 else 0.05
    for ours, theirs in zip(
        (out, *backward(cotangent)), (plain, *plain_backward(cotangent)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=0, atol=tolerance
        )


def test_under_vmap():
    arrays, visible = case(SHAPES[0], jnp.float32)
    mask = mask_of(visible)
    stacked = [jnp.stack([x, 2 * x]) for x in arrays]
    outs = jax.vmap(lambda *a: one_query_attention(*a, mask))(*stacked)
    np.testing.assert_array_equal(outs[0], one_query_attention(*arrays, mask))


def test_what_it_leaves_to_the_formula(monkeypatch):
    arrays, visible = case(SHAPES[0], jnp.float32)
    mask = mask_of(visible)
    assert one_query_attention(*arrays, AttentionMask()) is None  # no cache
    assert one_query_attention(*(x.astype(jnp.float16) for x in arrays), mask) is None
    two = jnp.concatenate([arrays[0]] * 2, axis=1)
    assert one_query_attention(two, *arrays[1:], mask) is None
    assert attention(*arrays, mask, output_weights=True)[1].shape == (ROWS, 9, 1, CAPACITY)
    monkeypatch.setattr(one_query, "step_kernels", lambda: None)
    assert one_query_attention(*arrays, mask) is None


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_copies_no_cache(batch):
    """Neither to write a token into it, nor to lay it out for a matmul."""
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    request = loop.Request(8, Sampling(), (), None)
    started = loop._start(model, jnp.ones((batch, 4), jnp.int32), None, request)
    ending = loop.Ending(np.zeros(0, np.int32), np.asarray(0, np.int32))
    numbers = [np.asarray(n, np.int32) for n in (12, 4)]
    state, state_tree = jax.tree.flatten(started.state)

    def decode(state, decoder):
        state = state_tree.unflatten(state)
        return loop._decode.__wrapped__(decoder, state, *numbers, request.sampling, ending, None)

    run = jax.jit(decode, donate_argnums=0)
    program = run.lower(state, unstack_layers(model)).compile().as_text()
    capacity = started.state.cache.capacity
    shape = re.escape(f"f32[{batch * config.kv_heads},{capacity},{config.head_size}]")
    in_place = rf"= {shape}\S* (fusion|dynamic-update-slice|get-tuple-element|parameter)\("
    made = re.findall(rf"= {shape}\S* ([\w-]+)\(", program)
    assert "llama_jax_one_query" in program
    assert made
    assert len(re.findall(in_place, program)) == len(made), set(made)
    assert program.count("dynamic-update-slice(") >= 2 * config.num_hidden_layers
