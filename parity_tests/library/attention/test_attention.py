"""Every implementation of attention equals the formula, in values and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax.attention import splash
from llama_jax.attention.blocked import blocked_attention
from llama_jax.attention.dispatch import PLAIN_LENGTH, attention
from llama_jax.attention.masks import AttentionMask, attention_mask, dense_mask, sees_something
from llama_jax.attention.plain import dot_product_attention
from parity_tests.harness.compilation import compiler_options
from parity_tests.reference.errors import relative_error
from parity_tests.reference.tolerances import ROUNDING_RATIO

BATCH, DIM = 2, 4


def arrays(seq, heads=4, kv_heads=2, dtype=jnp.float64, batch=BATCH, dim=DIM):
    rng = np.random.default_rng(seq)
    return [
        jnp.asarray(rng.normal(size=(batch, seq, count, dim)), dtype)
        for count in (heads, kv_heads, kv_heads)
    ]


def mask_of(kind, seq):
    rng = np.random.default_rng(1)
    is_token = np.ones((BATCH, seq), bool)
    segments = None
    if "left" in kind:
        is_token[0, : seq // 3] = False
    if "right" in kind:
        is_token[1, seq - seq // 3 :] = False
    if "middle" in kind:
        is_token[:, seq // 3 : seq // 2] = False
    if "nothing" in kind:
        is_token[0] = False
    if "packed" in kind:
        segments = jnp.asarray(np.sort(rng.integers(0, 4, (BATCH, seq)), axis=1), jnp.int32)
    if "scattered" in kind:  # a segment that goes on after another
        segments = jnp.asarray(rng.integers(0, 3, (BATCH, seq)), jnp.int32)
    until = None
    if "until" in kind:
        until = jnp.asarray(np.arange(seq) + rng.integers(-1, seq, (BATCH, seq)), jnp.int32)
    tokens = None if is_token.all() else jnp.asarray(is_token)
    return AttentionMask(None, None, tokens, segments, segments, visible_until=until)


def value_and_gradients(run, operands):
    def scalar(*operands):
        out = run(*operands).astype(jnp.float64)
        return jnp.sum(out * jnp.linspace(-1, 2, out.size).reshape(out.shape)), out

    both = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)
    options = compiler_options(operands[0].dtype)
    (_, out), gradients = jax.jit(both, compiler_options=options)(*operands)
    return [out, *gradients]


def plain(mask):
    def run(query, key, value):
        dense = dense_mask(mask, query.shape[1], key.shape[1])
        return dot_product_attention(query, key, value, dense)[0]

    return run


MASKS = [
    *("causal", "left", "right", "middle", "nothing", "packed", "scattered"),
    "left packed right",
    "middle scattered nothing",
]


@pytest.mark.parametrize("kind", [*MASKS, "until", "left packed until"])
@pytest.mark.parametrize(
    ("seq", "block"),
    # one token, less than a block, blocks, a part of one, blocks that share a frontier
    [(1, 8), (7, 8), (16, 8), (37, 8), (203, 8)],
)
def test_blocked_equals_plain(kind, seq, block):
    with jax.enable_x64(True):
        operands, mask = arrays(seq), mask_of(kind, seq)
        want = value_and_gradients(plain(mask), operands)
        got = value_and_gradients(lambda *a: blocked_attention(*a, mask, block), operands)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
        sees_any = np.asarray(sees_something(mask, seq, seq, block=8))
        assert (np.asarray(got[0]).any(axis=(2, 3)) == sees_any).all()
        assert not np.asarray(got[1])[~np.broadcast_to(sees_any, (BATCH, seq))].any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_blocked_groups_heads_like_plain(heads, kv_heads):
    with jax.enable_x64(True):
        operands, mask = arrays(19, heads, kv_heads), mask_of("packed", 19)
        want = value_and_gradients(plain(mask), operands)
        got = value_and_gradients(lambda *a: blocked_attention(*a, mask, 8), operands)
        for ours, theirs in zip(got, want, strict=True):
            assert relative_error(ours, theirs) <= 1e-13


def test_blocked_with_explicit_slots():
    """As in a shard of a sequence or with a cache: the queries start at the eleventh key."""
    with jax.enable_x64(True):
        query, key, value = arrays(30)
        mask = AttentionMask(jnp.arange(11, 30), jnp.arange(30))
        want = value_and_gradients(plain(mask), [query[:, 11:], key, value])
        got = value_and_gradients(
            lambda *a: blocked_attention(*a, mask, 8), [query[:, 11:], key, value]
        )
        for ours, theirs in zip(got, want, strict=True):
            assert relative_error(ours, theirs) <= 1e-13


@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_blocked_rounds_no_more_than_torch(kind):
    """Float32, for the output and the gradients of a random cotangent, pooled over seeds."""
    seq, dim, errors = 512, 32, np.zeros((2, 4))
    mask = mask_of(kind, seq)
    visible = torch.from_numpy(np.array(dense_mask(mask, seq, seq)))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        wide = [rng.normal(size=(BATCH, seq, heads, dim)) for heads in (4, 2, 2, 4)]
        *operands, cotangent = (array.astype(np.float32) for array in wide)

        def by_torch(dtype, operands=operands, cotangent=cotangent):
            heads_first = [
                torch.from_numpy(array.swapaxes(1, 2).copy()).to(dtype).requires_grad_()
                for array in operands
            ]
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, attn_mask=visible, enable_gqa=True
            )
            out.backward(torch.from_numpy(cotangent.swapaxes(1, 2).copy()).to(dtype))
            results = [out.detach(), *(tensor.grad for tensor in heads_first)]
            return [tensor.numpy().swapaxes(1, 2) for tensor in results]

        out, back = jax.vjp(
            jax.jit(lambda *a: attention(*a, mask, implementation="blocked")[0]),
            *map(jnp.asarray, operands),
        )
        ours = [out, *back(jnp.asarray(cotangent))]
        truth = by_torch(torch.float64)
        for row, results in enumerate((ours, by_torch(torch.float32))):
            errors[row] += [
                np.sum((np.asarray(a) - b) ** 2) for a, b in zip(results, truth, strict=True)
            ]
    assert (np.sqrt(errors[0]) <= ROUNDING_RATIO * np.sqrt(errors[1])).all(), np.sqrt(
        errors[0] / errors[1]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_blocked_rounds_no_more_than_plain(dtype):
    """Against float64, pooled over the numbers of a row of blocks."""
    with jax.enable_x64(True):
        operands, mask = arrays(300, dtype=dtype, dim=32), mask_of("packed", 300)
        exact = value_and_gradients(plain(mask), [a.astype(jnp.float64) for a in operands])
        for got, want, truth in zip(
            value_and_gradients(lambda *a: blocked_attention(*a, mask, 64), operands),
            value_and_gradients(plain(mask), operands),
            exact,
            strict=True,
        ):
            ours, theirs = (
                np.sqrt(np.mean(np.square(np.asarray(x, np.float64) - np.asarray(truth))))
                for x in (got, want)
            )
            assert ours <= ROUNDING_RATIO * theirs
    for gradient, operand in zip(
        jax.grad(lambda *a: blocked_attention(*a, mask, 64).sum(), argnums=(0, 1, 2))(*operands),
        operands,
        strict=True,
    ):
        assert gradient.dtype == operand.dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_blocked_holds_no_scores_of_the_full_sequence(dtype):
    """At 2048 tokens, forward and backward: no buffer [..., 2048, 2048], a sixth of plain's memory."""
    seq = 2048
    operands = [jax.ShapeDtypeStruct((1, seq, heads, 32), dtype) for heads in (8, 4, 4)]

    def memory(run):
        gradient = jax.grad(lambda *a: run(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        program = jax.jit(gradient).lower(*operands).compile()
        return program.memory_analysis().temp_size_in_bytes, program.as_text()

    mask = AttentionMask()
    ours, text = memory(lambda *a: attention(*a, mask, implementation="blocked")[0])
    theirs, plain_text = memory(lambda *a: attention(*a, mask, implementation="plain")[0])
    assert re.search(r"2048,2048", plain_text)
    assert not re.search(r"2048,2048", text)
    assert ours < theirs / 6


def test_default_implementation():
    """Chosen by length on a CPU; "plain" whenever there are weights or dropout."""

    def holds_scores(seq, **options):
        operands = arrays(seq, dtype=jnp.float32)
        text = str(
            jax.make_jaxpr(lambda *a: attention(*a, AttentionMask(), **options)[0])(*operands)
        )
        return f"{seq},{seq}]" in text

    long = 2 * PLAIN_LENGTH
    assert holds_scores(PLAIN_LENGTH)
    assert not holds_scores(long)
    assert holds_scores(long, implementation="plain")
    assert holds_scores(long, output_weights=True)
    assert holds_scores(long, dropout_rate=0.5, dropout_key=jax.random.key(0))
    assert not holds_scores(long, dropout_rate=0.0, dropout_key=jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "flash"}, "found 'flash', expected None or one of 'plain', 'blocked'"),
        (
            {"implementation": "cudnn"},
            "='cudnn': found the platform 'cpu', expected 'gpu'; without it",
        ),
        ({"implementation": "triton"}, "='triton': found the platform 'cpu', expected 'gpu'"),
        ({"implementation": "splash"}, "='splash': found the platform 'cpu', expected 'tpu'"),
        (
            {"implementation": "blocked", "output_weights": True},
            "='blocked': found attention weights",
        ),
    ],
)
def test_unsupported_requests_are_errors(options, message):
    with pytest.raises(ValueError) as caught:
        attention(*arrays(200, dtype=jnp.float32), AttentionMask(), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", MASKS)
def test_splash_equals_plain(kind):
    """The TPU kernel in interpret mode."""
    seq = 256
    operands = arrays(seq, dtype=jnp.float32, dim=16)
    mask = mask_of(kind, seq)
    kernel = splash.splash_kernel(seq, seq, heads=4, interpret=True)
    with jax.enable_x64(True):
        want = value_and_gradients(plain(mask), [a.astype(jnp.float64) for a in operands])
    out, pullback = jax.vjp(lambda *a: splash.splash_attention(kernel, *a, mask), *operands)
    slope = jnp.linspace(-1, 2, out.size).reshape(out.shape)
    for ours, theirs in zip([out, *pullback(slope)], want, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_dense_mask_equals_attention_mask():
    segments = jnp.asarray([[0, 0, 1, 1], [2, 2, 2, 2]])
    is_token = jnp.asarray([[True, True, True, False], [False, True, True, True]])
    slots = jnp.arange(4)
    mask = AttentionMask(None, None, is_token, segments, segments)
    want = attention_mask(slots, slots, is_token, segments, segments)
    assert (dense_mask(mask, 4, 4) == want).all()
    assert (sees_something(mask, 4, 4, block=3) == want.any(axis=(1, 3))).all()


def test_a_key_is_visible_until_a_query():
    mask = AttentionMask(visible_until=jnp.asarray([[3, 1, -1, 9]]))
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]
    assert (np.asarray(dense_mask(mask, 4, 4))[0, 0] == np.asarray(want, bool)).all()
