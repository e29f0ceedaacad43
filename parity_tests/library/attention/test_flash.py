"""Attention of many queries on a CPU, by the kernels that read queries, keys and values where they are."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax.attention import blocked, flash
from llama_jax.attention.blocked import blocked_attention
from llama_jax.attention.flash import takes_flash, takes_flash_gradients
from llama_jax.attention.masks import AttentionMask, dense_mask
from llama_jax.numerics.cpu.available import may_have_flash_kernel
from parity_tests.reference.errors import rms_error
from parity_tests.reference.tolerances import ROUNDING_RATIO
from train.hardware.flops import matmul_flops

pytestmark = pytest.mark.skipif(not may_have_flash_kernel(), reason="no numba or no AVX-512")


@pytest.fixture(autouse=True)
def trains_with_few_queries(monkeypatch):
    monkeypatch.setattr(flash, "_LEAST_QUERIES_TO_TRAIN", 1)


BATCH = 2
# queries, keys, the slot of the first query, heads, kv_heads, dim
CASES = {
    "a layer of SmolLM2": (300, 300, 0, 9, 3, 64),
    "a cache with room": (200, 330, 0, 4, 2, 32),
    "a cache in use": (133, 500, 301, 4, 4, 128),
    "more keys than a chunk": (130, 2300, 2101, 8, 1, 96),
}
MASKS = ["causal", "left", "holes", "packed", "until"]


def case(name: str) -> tuple[list[jax.Array], int]:
    """Query, key and value, and the slot of the first query."""
    q, k, start, heads, kv_heads, dim = CASES[name]
    rng = np.random.default_rng(0)
    sizes = (q, heads), (k, kv_heads), (k, kv_heads)
    arrays = [rng.standard_normal((BATCH, *size, dim)).astype(np.float32) for size in sizes]
    arrays[0] *= 3  # weights that differ
    return [jnp.asarray(x) for x in arrays], start


def mask_of(kind: str, arrays: list[jax.Array], start: int) -> AttentionMask:
    rng = np.random.default_rng(1)
    q, k = arrays[0].shape[1], arrays[1].shape[1]
    is_token, segments = np.ones((BATCH, k), bool), np.zeros((BATCH, k), np.int32)
    until = None
    if kind == "left":
        is_token[0, :77] = False
    if kind == "holes":
        is_token[:, 20:40] = is_token[1, 90:95] = False
    if kind == "packed":
        segments = np.sort(rng.integers(0, 4, (BATCH, k)), axis=1).astype(np.int32)
    if kind == "until":
        until = jnp.asarray(np.arange(k) + rng.integers(-1, k, (BATCH, k)), jnp.int32)
    return AttentionMask(
        jnp.arange(start, start + q, dtype=jnp.int32),
        jnp.arange(k, dtype=jnp.int32),
        jnp.asarray(is_token),
        jnp.asarray(segments[:, start : start + q]),
        jnp.asarray(segments),
        visible_until=until,
    )


def by_torch(arrays: list[jax.Array], mask: AttentionMask, dtype: torch.dtype) -> np.ndarray:
    """Zeros for queries that see nothing, as ours."""
    q, k = arrays[0].shape[1], arrays[1].shape[1]
    visible = np.broadcast_to(dense_mask(mask, q, k), (BATCH, 1, q, k))
    out = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(np.array(x)).to(dtype).transpose(1, 2) for x in arrays),
        attn_mask=torch.from_numpy(visible.copy()),
        enable_gqa=True,
    )
    sees_any = visible.any(axis=3)[:, 0, :, None, None]
    return np.where(sees_any, out.transpose(1, 2).numpy(), 0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_it_rounds_no_more_than_torch(name, kind):
    arrays, start = case(name)
    mask = mask_of(kind, arrays, start)
    assert takes_flash(*arrays)
    out = jax.jit(blocked_attention)(*arrays, mask)
    truth = by_torch(arrays, mask, torch.float64)
    theirs = rms_error(by_torch(arrays, mask, torch.float32), truth)
    assert rms_error(np.asarray(out), truth) <= ROUNDING_RATIO * theirs


def gradients_by_torch(
    arrays: list[jax.Array], mask: AttentionMask, cotangent: np.ndarray, dtype: torch.dtype
) -> list[np.ndarray]:
    q, k = arrays[0].shape[1], arrays[1].shape[1]
    visible = torch.from_numpy(np.array(dense_mask(mask, q, k)))
    leaves = [torch.from_numpy(np.array(x)).to(dtype).requires_grad_() for x in arrays]
    query, key, value = (x.transpose(1, 2) for x in leaves)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    weights = scores.masked_fill(~visible, torch.finfo(dtype).min).softmax(dim=-1) * visible
    out = (weights @ value).transpose(1, 2)
    return [
        x.numpy() for x in torch.autograd.grad(out, leaves, torch.from_numpy(cotangent).to(dtype))
    ]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_round_no_more_than_torch(name, kind):
    arrays, start = case(name)
    mask = mask_of(kind, arrays, start)
    assert takes_flash_gradients(*arrays)
    cotangent = np.random.default_rng(2).standard_normal(arrays[0].shape).astype(np.float32)
    _, backward = jax.vjp(jax.jit(lambda *a: blocked_attention(*a, mask)), *arrays)
    truth = gradients_by_torch(arrays, mask, cotangent, torch.float64)
    theirs = gradients_by_torch(arrays, mask, cotangent, torch.float32)
    for ours, torchs, exact in zip(backward(jnp.asarray(cotangent)), theirs, truth, strict=True):
        allowed = ROUNDING_RATIO * rms_error([torchs], [exact])
        assert rms_error([np.asarray(ours)], [exact]) <= allowed


def test_gradients_without_slots():
    """The mask of training: a query sees what is not after it."""
    arrays, start = case("a layer of SmolLM2")
    mask = mask_of("packed", arrays, start)
    assert start == 0

    def gradients(mask):
        return jax.jit(
            jax.grad(lambda *a: (blocked_attention(*a, mask) ** 2).sum(), argnums=(0, 1, 2))
        )(*arrays)

    without = gradients(mask._replace(query_slots=None, key_slots=None))
    for one, other in zip(without, gradients(mask), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("group", [1, 2, 3, 9])
@pytest.mark.parametrize("queries", [128, 129, 191])
def test_gradients_of_any_count_of_rows(group, queries):
    """Rows and keys that fill no block."""
    rng = np.random.default_rng(0)
    sizes = 2 * group, 2, 2
    arrays = [
        jnp.asarray(rng.standard_normal((1, queries, heads, 32)), jnp.float32) for heads in sizes
    ]
    assert takes_flash_gradients(*arrays)
    cotangent = rng.standard_normal(arrays[0].shape).astype(np.float32)
    _, backward = jax.vjp(lambda *a: blocked_attention(*a, AttentionMask()), *arrays)
    truth = gradients_by_torch(arrays, AttentionMask(), cotangent, torch.float64)
    for ours, exact in zip(backward(jnp.asarray(cotangent)), truth, strict=True):
        assert rms_error([np.asarray(ours)], [exact]) <= 1e-6


def test_a_query_that_sees_nothing_yields_zeros():
    arrays, start = case("a cache with room")
    mask = mask_of("causal", arrays, start)
    mask = mask._replace(key_is_token=mask.key_is_token.at[1].set(False).at[0, :3].set(False))
    out = blocked_attention(*arrays, mask)
    assert not out[1].any()
    assert not out[0, :3].any()
    assert out[0, 3:].all()


@pytest.mark.parametrize("kind", ["causal", "left"])
def test_slots_that_are_not_in_use_are_not_read(kind):
    arrays, start = case("a cache with room")
    mask, used = mask_of(kind, arrays, start), arrays[0].shape[1]
    unused = [x.at[:, used:].set(jnp.nan) for x in arrays[1:]]
    np.testing.assert_array_equal(
        blocked_attention(arrays[0], *unused, mask), blocked_attention(*arrays, mask)
    )


def test_nan_stays_with_those_who_see_it():
    arrays, start = case("a layer of SmolLM2")
    arrays[1] = arrays[1].at[0, 100, 1].set(jnp.nan)
    out = np.isnan(blocked_attention(*arrays, mask_of("causal", arrays, start)))
    assert out[0, 100:, 3:6].all()
    assert out.sum() == 200 * 3 * 64


def test_large_scores():
    """The weights of one key and of two, with others that vanish."""
    arrays, start = case("a cache with room")
    mask = mask_of("causal", arrays, start)
    query, key, value = arrays
    ones = jnp.ones_like(query)
    key = jnp.zeros_like(key).at[:, 5:7].set(1e4)
    out = blocked_attention(ones, key, value, mask)
    both = jnp.repeat((value[:, 5] + value[:, 6]) / 2, 2, axis=1)
    np.testing.assert_allclose(out[:, 5], jnp.repeat(value[:, 5], 2, axis=1), atol=1e-6)
    np.testing.assert_allclose(out[:, 150], both, atol=1e-6)


def test_calls_from_several_threads():
    arrays, start = case("more keys than a chunk")
    mask = mask_of("causal", arrays, start)
    run = jax.jit(blocked_attention)
    expected = run(*arrays, mask)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: run(*arrays, mask), range(12)):
            np.testing.assert_array_equal(out, expected)


def test_under_vmap():
    arrays, start = case("a cache with room")
    mask = mask_of("holes", arrays, start)
    stacked = [jnp.stack([x, 2 * x]) for x in arrays]
    outs = jax.vmap(lambda *a: blocked_attention(*a, mask))(*stacked)
    np.testing.assert_array_equal(outs[0], blocked_attention(*arrays, mask))


def test_what_is_left_to_xla(monkeypatch):
    def takes(heads=4, kv_heads=2, dim=64, dtype=jnp.float32):
        shapes = ((1, 256, count, dim) for count in (heads, kv_heads, kv_heads))
        return takes_flash(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))

    assert takes()
    assert not takes(dtype=jnp.bfloat16)
    assert not takes(dtype=jnp.float64)
    assert not takes(dim=80)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert not takes()
    monkeypatch.setattr(flash, "may_have_flash_kernel", lambda: False)
    assert not takes()


def test_without_a_numba_that_works(monkeypatch):
    arrays, start = case("a cache with room")
    mask = mask_of("holes", arrays, start)

    def run():
        jax.clear_caches()  # what was traced before knows of the kernel
        out, backward = jax.jit(lambda *a: jax.vjp(blocked_attention, *a, mask))(*arrays)
        return out, *backward(jnp.ones_like(out))[:3]

    monkeypatch.setattr(flash, "flash_kernel", lambda: None)
    with_it = run()
    monkeypatch.setattr(blocked, "takes_flash_gradients", lambda *_: False)
    for one, other in zip(with_it, run(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_short_sequences_compile_no_kernel(monkeypatch):
    arrays, _ = case("a layer of SmolLM2")
    monkeypatch.setattr(flash, "flash_kernel", lambda: pytest.fail("it compiles the kernel"))
    jax.jit(blocked_attention).lower(*(x[:, :100] for x in arrays), AttentionMask())
    monkeypatch.setattr(flash, "_LEAST_QUERIES_TO_TRAIN", 1024)
    jax.jit(lambda *a: jax.vjp(blocked_attention, *a, AttentionMask())[0]).lower(*arrays)


def test_programs_show_the_matmuls(monkeypatch):
    """To those who count them, such as `train.hardware.flops`."""
    arrays, _ = case("a layer of SmolLM2")

    def flops():
        run = partial(blocked_attention, mask=AttentionMask())
        return matmul_flops(jax.make_jaxpr(run)(*arrays).jaxpr)

    ours = flops()
    program = jax.jit(blocked_attention).lower(*arrays, AttentionMask()).compile().as_text()
    assert "llama_jax_flash_attention" in program
    monkeypatch.setattr(blocked, "takes_flash", lambda *_: False)
    assert ours == flops() > 0
