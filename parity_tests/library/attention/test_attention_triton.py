"""The Triton kernels, run as plain JAX: values, gradients and transformations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from llama_jax import LlamaConfig
from llama_jax.attention.cache import init_cache
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.triton import triton_attention, why_not_triton
from llama_jax.models.decoder import mask_and_cache
from llama_jax.numerics.remat import checkpointed
from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.library.attention.triton_cases import (
    BATCH,
    KINDS,
    SMALL,
    errors,
    fused,
    mask_of,
    operands,
    plain,
)
from parity_tests.reference.tolerances import ROUNDING_RATIO

# seq, heads, kv_heads, dim
SHAPES = {
    "one token": (1, 2, 2, 64),
    "2:1": (40, 4, 2, 64),
    "8:1": (71, 8, 1, 32),
    "4:1": (64, 8, 2, 64),
    "1:1": (96, 2, 2, 128),
    "dim 8": (40, 4, 2, 8),
    "dim 80": (40, 3, 1, 80),
    "dim 96": (70, 2, 2, 96),
    "dim 256": (40, 2, 1, 256),
}
DTYPES = (jnp.bfloat16, jnp.float16)


def require_error_of_plain(arrays, mask):
    """Of output and three gradients, against float64: at most 1.25 times as large."""
    both = (errors(arrays, mask, run(arrays, mask)) for run in (fused, plain))
    for ours, reference in zip(*both, strict=True):
        # of one key the plain gradients are exact, where the fused ones cancel in float32
        assert ours <= ROUNDING_RATIO * reference + 4 * np.finfo(np.float32).eps


def cases():
    """All kinds of masks in one shape, two in every shape; every kind in every shape and dtype is slow."""
    for kind, shape, dtype in itertools.product(KINDS, SHAPES, DTYPES):
        usual = dtype == jnp.bfloat16 and (shape == "4:1" or kind == "left packed right")
        usual &= shape not in ("one token", "2:1", "dim 8", "dim 96", "dim 256")
        usual |= dtype == jnp.float16 and (shape, kind) == ("4:1", "packed")
        marks = [] if usual else [pytest.mark.slow]
        yield pytest.param(kind, shape, dtype, marks=marks, id=f"{kind}-{shape}-{dtype.__name__}")


@pytest.mark.parametrize(("kind", "shape", "dtype"), list(cases()))
def test_error_is_that_of_the_plain_formula(kind, shape, dtype):
    seq, *sizes = SHAPES[shape]
    require_error_of_plain(operands(seq, seq, *sizes, dtype), mask_of(kind, seq))


def test_rows_that_see_nothing_are_zeros():
    results = fused(operands(64, 64, 8, 2, 64, jnp.bfloat16), mask_of("nothing", 64))
    assert all(jnp.all(array[0] == 0) for array in results)
    assert all(jnp.any(array[1] != 0) for array in results)


def test_no_bit_differs_between_runs():
    arrays, mask = operands(64, 64, 8, 2, 64, jnp.bfloat16), mask_of("packed", 64)
    first, second = fused(arrays, mask), fused(arrays, mask)
    assert all(jnp.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_kernel_adds_to_what_another_program_adds_to():
    """On a GPU the order of atomic additions is not the same in every run."""
    arrays, mask = operands(64, 64, 8, 2, 64, jnp.bfloat16), mask_of("packed", 64)
    names = {
        equation.primitive.name
        for equation in equations(jax.make_jaxpr(fused.__wrapped__)(arrays, mask))
    }
    assert {"pallas_call", "swap", "dot_general", "while"} <= names
    assert not [name for name in names if "atomic" in name or name == "addupdate"]


@pytest.mark.parametrize(
    ("q", "start", "capacity"),
    [
        (20, 30, 71),
        pytest.param(3, 47, 64, marks=pytest.mark.slow),
        pytest.param(64, 0, 96, marks=pytest.mark.slow),
    ],
)
def test_a_cache(q, start, capacity):
    """A prefill, of a prompt with padding, and a few tokens after what is cached."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    cache = init_cache(config, BATCH, capacity, jnp.bfloat16)
    is_token = jnp.ones((BATCH, start + q), bool).at[0, :7].set(False)
    segments = (jnp.arange(start + q) >= (start + q) // 4).astype(jnp.int32)[None].repeat(BATCH, 0)
    if start:
        before = is_token[:, :start], segments[:, :start]
        _, cache = mask_and_cache(BATCH, start, *before, cache)
    mask, _ = mask_and_cache(BATCH, q, is_token[:, start:], segments[:, start:], cache)
    assert mask.query_slots is not None
    require_error_of_plain(operands(q, capacity, 2, 1, 64, jnp.bfloat16), mask)


def test_a_part_of_the_sequence():
    """As on one shard of a sequence axis: later queries, all keys."""
    query, key, value, gradient = operands(80, 80, 4, 2, 64, jnp.bfloat16)
    mask = mask_of("packed", 80)
    slots = jnp.arange(80, dtype=jnp.int32)
    part = mask._replace(
        query_slots=slots[48:], key_slots=slots, query_segments=mask.query_segments[:, 48:]
    )
    whole = fused([query, key, value, gradient], mask)
    last = fused([query[:, 48:], key, value, gradient[:, 48:]], part)
    for ours, expected in zip(last[:2], whole[:2], strict=True):
        assert jnp.array_equal(ours, expected[:, 48:])


def equations(jaxpr):
    """All equations of a jaxpr and of those within."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(value)


def is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@pytest.mark.parametrize(
    ("remat", "forward_passes"), [("dots", 1), pytest.param("full", 2, marks=pytest.mark.slow)]
)
def test_layers_under_scan_and_remat(remat, forward_passes):
    """The gradients are those without; only "full" runs the forward kernel twice."""
    query, key, value, _ = operands(40, 40, 4, 2, 64, jnp.bfloat16)
    mask = mask_of("left packed right", 40)

    def layer(x, scale):
        out = triton_attention(x * scale, key, value, mask, SMALL)
        return checkpoint_name(out, "projection"), None

    def energy(scales, remat):
        out, _ = jax.lax.scan(checkpointed(layer, remat, in_scan=True), query, scales)
        return jnp.sum(out.astype(jnp.float32))

    scales = jnp.asarray([1.0, -2.0], jnp.bfloat16)
    gradient = jax.jit(jax.grad(energy), static_argnums=1, compiler_options=FAST_COMPILE)
    jaxpr = jax.make_jaxpr(jax.grad(energy), static_argnums=1)(scales, remat)
    calls = [e.params["name"] for e in equations(jaxpr) if e.primitive.name == "pallas_call"]
    assert calls.count("attention_forward") == forward_passes
    assert calls.count("attention_d_query") == calls.count("attention_d_key_value") == 1
    assert jnp.array_equal(gradient(scales, remat), gradient(scales, "none"))


def test_vmap():
    arrays = [jnp.stack([a, 2 * a]) for a in operands(40, 40, 4, 2, 64, jnp.bfloat16)]
    mask = mask_of("left packed right", 40)
    together = jax.jit(jax.vmap(fused.__wrapped__, (0, None)), compiler_options=FAST_COMPILE)(
        arrays, mask
    )
    for index in range(2):
        alone = fused([array[index] for array in arrays], mask)
        assert all(jnp.array_equal(a[index], b) for a, b in zip(together, alone, strict=True))


def test_grouped_keys_are_not_repeated():
    """No array but the queries' has their number of heads."""
    arrays = operands(64, 64, 8, 2, 64, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(fused.__wrapped__)(arrays, AttentionMask())
    calls = [e for e in equations(jaxpr) if e.primitive.name == "pallas_call"]
    read = [variable.aval.shape for call in calls for variable in call.invars]
    assert read.count(arrays[1].shape) == 2 * 3  # keys and values in each of three kernels
    largest = max(v.aval.size for e in equations(jaxpr) for v in e.outvars)
    assert largest == arrays[0].size


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 8, 2, 64), jnp.float32, "float32, expected bfloat16 or float16"),
        ((1, 8, 2, 100), jnp.bfloat16, "head_dim 100, expected a multiple of 8 up to 256"),
        ((1, 8, 2, 512), jnp.bfloat16, "head_dim 512, expected a multiple of 8 up to 256"),
        ((1, 8, 2, 128), jnp.bfloat16, None),
    ],
)
def test_what_they_cannot_do(shape, dtype, reason):
    assert why_not_triton(jnp.zeros(shape, dtype), AttentionMask(), 1) == reason
