"""The Triton kernels, run as plain JAX: values, gradients and which blocks are visited."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.attention.masks import AttentionMask, dense_mask
from llama_jax.attention.plain import dot_product_attention
from llama_jax.attention.triton import (
    Blocks,
    Kernels,
    mask_operands,
    triton_attention,
    visited_blocks,
    why_not_triton,
)
from parity_tests.reference.tolerances import ROUNDING_RATIO

BATCH = 2
# blocks of another size in each kernel, none of them square
SMALL = Kernels(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), interpret=True)


def mask_of(kind: str, seq: int) -> AttentionMask:
    rng = np.random.default_rng(1)
    is_token = np.ones((BATCH, seq), bool)
    segments = None
    if "left" in kind:
        is_token[0, : seq // 3] = False
    if "right" in kind:
        is_token[1, seq - seq // 3 :] = False
    if "nothing" in kind:
        is_token[0] = False
    if "packed" in kind:
        segments = jnp.asarray(np.sort(rng.integers(0, 4, (BATCH, seq)), axis=1), jnp.int32)
    if "scattered" in kind:  # a segment that continues after another one
        segments = jnp.asarray(rng.integers(0, 3, (BATCH, seq)), jnp.int32)
    tokens = None if is_token.all() else jnp.asarray(is_token)
    return AttentionMask(None, None, tokens, segments, segments)


def operands(seq: int, heads: int, kv_heads: int, dim: int, dtype: jnp.dtype) -> list[jax.Array]:
    """Query, key, value and the gradient of the output."""
    rng = np.random.default_rng(seq)
    return [
        jnp.asarray(rng.normal(size=(BATCH, seq, count, dim)), jnp.float32).astype(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def value_and_gradients(run, arrays, dtype):
    *inputs, gradient = (array.astype(dtype) for array in arrays)
    out, pull = jax.vjp(run, *inputs)
    return [np.asarray(array).astype(np.float64) for array in (out, *pull(gradient))]


def plain(mask: AttentionMask):
    def run(query, key, value):
        dense = dense_mask(mask, query.shape[1], key.shape[1])
        return dot_product_attention(query, key, value, dense)[0]

    return run


def errors(arrays, exact):
    return [float(np.sqrt(np.mean((a - e) ** 2))) for a, e in zip(arrays, exact, strict=True)]


KINDS = ["causal", "left", "right", "nothing", "packed", "scattered", "left packed right"]
SHAPES = [
    # seq, heads, kv_heads, dim: a token, less than a block, a part of one; MHA, GQA, MQA
    (1, 2, 2, 64),
    (40, 4, 2, 64),
    (71, 4, 1, 64),
    (96, 2, 2, 128),
]


def cases():
    """Every kind of mask, every shape and every dtype by default; each with each among the slow tests."""
    for kind, shape, dtype in itertools.product(KINDS, SHAPES, [jnp.bfloat16, jnp.float16]):
        usual = [kind == "left packed right", shape == SHAPES[1], dtype == jnp.bfloat16]
        marks = [] if sum(usual) >= 2 else [pytest.mark.slow]
        yield pytest.param(kind, shape, dtype, marks=marks, id=f"{kind}-{shape}-{dtype.__name__}")


@pytest.mark.parametrize(("kind", "shape", "dtype"), list(cases()))
def test_error_is_that_of_the_plain_formula(kind, shape, dtype):
    """Against float64, output and three gradients: at most 1.25 times as large."""
    seq, *sizes = shape
    mask = mask_of(kind, seq)
    with jax.enable_x64():
        arrays = operands(seq, *sizes, dtype)
        exact = value_and_gradients(plain(mask), arrays, jnp.float64)
        expected = errors(value_and_gradients(plain(mask), arrays, dtype), exact)
    fused = value_and_gradients(lambda *a: triton_attention(*a, mask, SMALL), arrays, dtype)
    for fused_error, plain_error in zip(errors(fused, exact), expected, strict=True):
        # of one key the plain gradients are exact, where the fused ones cancel in float32
        assert fused_error <= ROUNDING_RATIO * plain_error + 4 * np.finfo(np.float32).eps


def test_rows_that_see_nothing_are_zeros():
    mask = mask_of("nothing", 40)
    arrays = operands(40, 4, 2, 64, jnp.bfloat16)
    results = value_and_gradients(
        lambda *a: triton_attention(*a, mask, SMALL), arrays, jnp.bfloat16
    )
    assert all(np.all(array[0] == 0) for array in results)
    assert all(np.any(array[1] != 0) for array in results)


def test_a_part_of_the_sequence():
    """As on one shard of a sequence axis, or in a prefill: later queries, all keys."""
    query, key, value, _ = operands(80, 4, 2, 64, jnp.bfloat16)
    mask = mask_of("packed", 80)
    whole = triton_attention(query, key, value, mask, SMALL)
    slots = jnp.arange(80, dtype=jnp.int32)
    part = AttentionMask(slots[48:], slots, None, mask.query_segments[:, 48:], mask.key_segments)
    assert jnp.array_equal(triton_attention(query[:, 48:], key, value, part, SMALL), whole[:, 48:])


def test_blocks_of_other_documents_are_not_visited():
    """64 documents of 128 tokens cost less than a sixteenth of one document of 8192."""
    seq, block_q, block_k = 8192, 128, 64
    kernels = Kernels(*[Blocks(block_q, block_k, 8, 2)] * 3)
    one = AttentionMask()
    document = jnp.repeat(jnp.arange(64, dtype=jnp.int32), 128)[None]
    many = AttentionMask(None, None, None, document, document)
    counts = [
        int(visited_blocks(mask_operands(kernels, 1, seq, seq, mask), block_q, block_k).sum())
        for mask in (one, many)
    ]
    assert counts[0] == sum(-(-(row + 1) * block_q // block_k) for row in range(seq // block_q))
    assert counts[1] == 2 * 64
    assert counts[1] <= counts[0] / 16


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_that_holds_a_visible_pair_is_left_out(kind):
    seq, block_q, block_k = 96, 32, 16
    mask = mask_of(kind, seq)
    seen = visited_blocks(mask_operands(SMALL, BATCH, seq, seq, mask), block_q, block_k)
    dense = np.broadcast_to(np.asarray(dense_mask(mask, seq, seq))[:, 0], (BATCH, seq, seq))
    blocks = dense.reshape(BATCH, seq // block_q, block_q, seq // block_k, block_k).any((2, 4))
    assert not np.any(blocks & ~np.asarray(seen))


def test_grouped_keys_are_not_repeated():
    """No array but the queries' has their number of heads."""
    query, key, value, _ = operands(64, 8, 2, 64, jnp.bfloat16)

    def gradients(query, key, value):
        return jax.grad(lambda *a: triton_attention(*a, AttentionMask(), SMALL).sum(), (1, 2))(
            query, key, value
        )

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield from (variable.aval.shape for variable in equation.invars)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                    yield from shapes(inner)

    read = list(shapes(jax.make_jaxpr(gradients)(query, key, value).jaxpr))
    assert read.count(key.shape) == 2 * 3  # keys and values in each of three kernels


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 8, 2, 64), jnp.float32, "float32, expected bfloat16 or float16"),
        ((1, 8, 2, 80), jnp.bfloat16, "head_dim 80, expected one of 32, 64, 128"),
        ((1, 8, 2, 128), jnp.bfloat16, None),
    ],
)
def test_what_they_cannot_do(shape, dtype, reason):
    assert why_not_triton(jax.ShapeDtypeStruct(shape, dtype), AttentionMask(), 1) == reason
