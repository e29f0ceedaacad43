"""The zig-zag order: every shard does the same work, and nothing else changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import LlamaConfig, LlamaModel
from llama_jax.attention import splash
from llama_jax.attention.cache import init_cache
from llama_jax.attention.masks import AttentionMask, causal_shares, dense_mask
from llama_jax.attention.plain import dot_product_attention
from llama_jax.attention.triton import triton_attention
from llama_jax.attention.triton.blocks import Blocks, Kernels
from llama_jax.attention.triton.ranges import mask_operands, visible_blocks
from llama_jax.attention.zigzag import ZigZag
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.reference.errors import relative_error

ORDERS = [(ZigZag(4, 1), 16), (ZigZag(4, 3), 48), (ZigZag(3, 2), 36), (ZigZag(1, 2), 8)]


@pytest.mark.parametrize(("order", "length"), ORDERS)
def test_deal_and_collect(order, length):
    slots = order.slots(length)
    assert sorted(slots) == list(range(length))
    assert (np.diff(slots.reshape(order.shards, -1)) > 0).all()
    row = jnp.arange(2 * length * 3).reshape(2, length, 3)
    dealt = order.deal(row, 1)
    assert (dealt == row[:, slots]).all()
    assert (order.collect(dealt, 1) == row).all()


def test_chunks_are_whole_blocks_or_half_a_shard():
    assert ZigZag.of(32768, 4) == ZigZag(4, 512)
    assert ZigZag.of(1024, 4) == ZigZag(4, 128)
    assert ZigZag.of(3 * 1024, 4) == ZigZag(4, 128)
    assert ZigZag.of(512, 4) == ZigZag(4, 64)
    assert ZigZag.of(24, 4) == ZigZag(4, 3)


@pytest.mark.parametrize(
    "attempt", [lambda: ZigZag.of(20, 4), lambda: ZigZag.of(4, 4), lambda: ZigZag(4, 3).slots(32)]
)
def test_a_length_that_it_does_not_divide(attempt):
    with pytest.raises(ValueError, match=r"zig-zag order: found \d+ tokens, expected a multiple"):
        attempt()


@pytest.mark.parametrize("shards", [2, 4, 8, 16])
def test_equal_work(shards):
    """By tokens, and by the blocks that splash really visits, in each of its three kernels."""
    length = 8192
    order = ZigZag.of(length, shards)
    tokens = causal_shares(length, shards, order)
    assert np.ptp(tokens) == 0
    assert tokens.mean() == (length + 1) / 2 / length
    contiguous = causal_shares(length, shards, None)
    assert contiguous.max() / contiguous.mean() == pytest.approx(2 - 1 / shards, rel=1e-3)
    for order_or_none in (order, None):
        expected = splash.visited_shares(length, shards, order_or_none)
        kernel = splash.splash_kernel(length, length, 2, 1, shards, order=order_or_none)
        for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
            # the second axis is that of the queries; blocks that no query sees are left out or 0
            visited = [np.count_nonzero(part) for part in np.split(info.block_mask, shards, 1)]
            block_k = kernel.kwargs["block_sizes"].block_kv
            block_q = kernel.kwargs["block_sizes"].block_q
            blocks = (length // shards // block_q) * (length // block_k)
            assert np.allclose(np.array(visited) / blocks, expected, rtol=1e-12)
        if order_or_none is not None:
            assert np.ptp(expected) == 0


@pytest.mark.parametrize("order", [None, ZigZag(2, 128), ZigZag(2, 32)], ids=str)
def test_the_kernel_is_that_of_the_librarys_own_mask(order, monkeypatch):
    """Blocks off the diagonal are not compared slot by slot, which changes nothing."""
    ours = splash.splash_kernel(1024, 1024, 2, 1, 2, order=order)
    monkeypatch.setattr(splash, "_CausalMask", splash.splash.CausalMask)
    theirs = splash.splash_kernel(1024, 1024, 2, 1, 2, order=order)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_nearly_equal_work_on_packed_rows():
    """Of a kernel that skips other documents' blocks; long documents at the front and at the back."""
    length, shards, block_q, block_k = 16384, 4, 128, 64
    kernels = Kernels(*[Blocks(block_q, block_k, 8, 2)] * 3)
    order = ZigZag.of(length, shards)
    for long_ones in ([length // 2], [length // 4, length // 2], []):
        lengths = [*long_ones, *[1024] * ((length - sum(long_ones)) // 1024)]
        for row in (lengths, lengths[::-1]):
            segments = jnp.repeat(jnp.arange(len(row), dtype=jnp.int32), jnp.array(row))[None]

            def imbalance(slots, segments=segments):
                mask = AttentionMask(
                    jnp.asarray(slots), jnp.arange(length), None, segments[:, slots], segments
                )
                seen = visible_blocks(
                    mask_operands(kernels, 1, length, length, mask), block_q, block_k
                ).some
                work = np.asarray(seen).reshape(shards, -1).sum(1)
                return float(work.max() / work.mean())

            assert imbalance(order.slots(length)) <= 1.03
            if long_ones:
                assert imbalance(np.arange(length)) > 1.4


def operands(length, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 16) for heads in (2, 1, 1, 2)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed(length):
    rng = np.random.default_rng(1)
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (2, length)), axis=1), jnp.int32)
    is_token = jnp.ones((2, length), bool).at[1, -length // 5 :].set(False)
    return AttentionMask(None, None, is_token, segments, segments)


def exact(mask, arrays):
    """Output and gradients in float64."""
    with jax.enable_x64(True):
        *inputs, gradient = (array.astype(jnp.float64) for array in arrays)
        dense = dense_mask(mask, *(array.shape[1] for array in inputs[:2]))
        out, pullback = jax.vjp(lambda *a: dot_product_attention(*a, dense)[0], *inputs)
        return [np.asarray(array) for array in (out, *pullback(gradient))]


def of_all_shards(run, kernels, order, mask, arrays):
    """Output and gradients of `run(kernel, query, key, value, mask)`, one shard after the other."""
    query, key, value, gradient = arrays
    length = query.shape[1]
    slots = order.slots(length)

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def of_shard(kernel, query, gradient, part):
        out, pullback = jax.vjp(lambda *a: run(kernel, *a, part), query, key, value)
        return [out, *pullback(gradient)]

    results = []
    for kernel, places in zip(kernels, np.split(slots, order.shards), strict=True):
        part = AttentionMask(
            jnp.asarray(places),
            jnp.arange(length, dtype=jnp.int32),
            mask.key_is_token,
            mask.query_segments[:, places],
            mask.key_segments,
        )
        results.append(of_shard(kernel, query[:, places], gradient[:, places], part))
    out, d_query, d_key, d_value = zip(*results, strict=True)
    restored = [jnp.concatenate(each, 1)[:, np.argsort(slots)] for each in (out, d_query)]
    return [*restored, sum(d_key), sum(d_value)]


def test_splash_on_every_shard():
    """In interpret mode, each shard with its part of the kernel's mask."""
    length, order = 512, ZigZag(2, 128)
    kernel = splash.splash_kernel(length, length, 2, 1, 2, order=order, interpret=True)

    def part_of(info, shard):
        def take(array, axis):
            return jnp.split(array, order.shards, axis)[shard]

        by_block = {name: take(getattr(info, name), 1) for name in ("data_next", "block_mask")}
        return info._replace(**by_block, q_sequence=take(info.q_sequence, 0))

    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    kernels = [
        type(kernel)(*(part_of(info, shard) for info in infos), **kernel.kwargs)
        for shard in range(order.shards)
    ]
    mask, arrays = packed(length), operands(length)
    results = of_all_shards(splash.splash_attention, kernels, order, mask, arrays)
    for ours, theirs in zip(results, exact(mask, arrays), strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_triton_on_every_shard():
    length, order = 256, ZigZag(2, 32)
    blocks = Blocks(32, 16, 4, 1)
    kernels = Kernels(blocks, blocks, Blocks(16, 32, 4, 1), interpret=True)
    mask, arrays = packed(length), operands(length, jnp.bfloat16)

    def run(_, query, key, value, mask):
        return triton_attention(query, key, value, mask, kernels)

    results = of_all_shards(run, [None, None], order, mask, arrays)
    for ours, theirs in zip(results, exact(mask, arrays), strict=True):
        assert relative_error(ours, theirs) <= 1e-2  # bfloat16


CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_dropout=0.3,
)


@pytest.mark.parametrize(
    "options", [{"output_attentions": True}, {"dropout": True}, {"packed": True}], ids=str
)
def test_the_decoder_in_zigzag_order(options):
    """Hidden states and attention weights of the same tokens; dropout drops the same weights."""
    length, order = 48, ZigZag(4, 3)
    slots = order.slots(length)
    rng = np.random.default_rng(2)
    inputs = {"input_ids": rng.integers(0, 32, (2, length))}
    if options.pop("packed", False):
        inputs["attention_mask"] = (np.arange(length) < [[length], [40]]).astype(np.int32)
        inputs["segment_ids"] = np.sort(rng.integers(0, 3, (2, length)), axis=1)
        inputs["position_ids"] = rng.integers(0, 40, (2, length))
        options["attention_implementation"] = "blocked"
    if options.pop("dropout", False):
        options["dropout_key"] = jax.random.key(3)
    with jax.enable_x64(True):
        model = LlamaModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float64)
        dealt = {name: array[:, slots] for name, array in inputs.items()}
        run = jax.jit(
            lambda model, both: (
                model(**both[0], **options),
                model(**both[1], **options, token_order=order),
            ),
            compiler_options=FAST_COMPILE,
        )
        want, got = run(model, (inputs, dealt))
        hidden = want.last_hidden_state[:, slots]
        assert relative_error(got.last_hidden_state, hidden) <= 1e-12
        for ours, theirs in zip(got.attentions or (), want.attentions or (), strict=True):
            assert relative_error(ours, theirs[:, :, slots][:, :, :, slots]) <= 1e-12


def test_misuse():
    model = nnx.eval_shape(lambda: LlamaModel(CONFIG, rngs=nnx.Rngs(0)))
    ids = jnp.zeros((1, 20), jnp.int32)
    with pytest.raises(ValueError, match="found 20 tokens, expected a multiple of 24"):
        model(ids, token_order=ZigZag(4, 3))
    cache = init_cache(CONFIG, batch=1, capacity=24, dtype=jnp.float32)
    with pytest.raises(ValueError, match="at most one of cache and token_order"):
        model(ids, cache=cache, token_order=ZigZag(5, 2))
