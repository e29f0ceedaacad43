"""Matmuls of a decoding step: from bfloat16 and from codes on a CPU, as sums on a GPU."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from llama_jax import LlamaConfig, LlamaModel, init_cache
from llama_jax.models.layers import linear
from llama_jax.numerics import few_rows
from llama_jax.numerics.cpu import available
from llama_jax.numerics.few_rows import few_rows_matmul, multiply_in_memory, weight_in_memory
from llama_jax.quantization.weight import QuantizedWeight
from parity_tests.reference.errors import rms_error
from parity_tests.reference.tolerances import ROUNDING_RATIO

KINDS = {
    "8 bits": (8, None),
    "8 bits, groups of 96": (8, 96),
    "8 bits, groups of 16": (8, 16),
    "4 bits, groups of 64": (4, 64),
    "4 bits, groups of 32": (4, 32),
    "4 bits, groups of 96": (4, 96),
    "4 bits, groups of 24": (4, 24),
}


def quantized(shape: tuple[int, int], kind: str, dtype: jnp.dtype) -> QuantizedWeight:
    return coded(shape, *KINDS[kind], dtype)


def coded(
    shape: tuple[int, int], bits: int, group_size: int | None, dtype: jnp.dtype
) -> QuantizedWeight:
    values = np.random.default_rng(0).standard_normal(shape)
    return QuantizedWeight(nnx.Param(jnp.asarray(values, dtype), axes=("a", "b")), bits, group_size)


def exact(weight: QuantizedWeight) -> np.ndarray:
    """The matrix in float64, from its definition."""
    codes, scale = np.asarray(weight.codes[...]), np.asarray(weight.scale[...], np.float64)
    if weight.bits == 8:
        return (codes * scale[..., None]).reshape(len(codes), -1)
    values = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float64) - 8
    zero = np.asarray(weight.zero[...], np.float64)
    return (values * scale[..., None] + zero[..., None]).reshape(len(codes), -1)


def step(x: jax.Array, weight: jax.Array | QuantizedWeight) -> jax.Array:
    """`linear` of one token of each row."""
    return linear(x[:, None], weight, None)[:, 0]


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1537, 576), (192, 1152), (301, 192)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_round_no_more_than_torch_with_the_widened_weight(kind, shape, rows):
    weight = quantized(shape, kind, jnp.float32)
    x = np.random.default_rng(1).standard_normal((rows, shape[1])).astype(np.float32)
    out = jax.jit(step)(x, weight)
    reference = x.astype(np.float64) @ exact(weight).T
    theirs = torch.from_numpy(x) @ torch.from_numpy(np.array(weight[...])).T
    assert out.dtype == jnp.float32
    assert rms_error(out, reference) <= ROUNDING_RATIO * rms_error(theirs.numpy(), reference)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("group_size", [2, 16, 128, 256])
def test_any_size_of_groups(group_size, rows):
    weight = coded((7, 768), 4, group_size, jnp.float32)
    x = np.random.default_rng(1).standard_normal((rows, 768)).astype(np.float32)
    reference = x.astype(np.float64) @ exact(weight).T
    np.testing.assert_allclose(step(jnp.asarray(x), weight), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", [(1537, 576), (192, 1152)])
def test_float32_rounds_no_more_than_torch(shape, rows):
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((n, shape[1])).astype(np.float32) for n in (shape[0], rows))
    out = step(jnp.asarray(x), jnp.asarray(weight))
    reference = x.astype(np.float64) @ weight.astype(np.float64).T
    theirs = (torch.from_numpy(x) @ torch.from_numpy(weight).T).numpy()
    assert rms_error(out, reference) <= ROUNDING_RATIO * rms_error(theirs, reference)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 41), (6, 15)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_number_of_rows_and_columns(dtype, shape, rows):
    """Smaller than a block, and columns that fill no vector."""
    rng = np.random.default_rng(0)
    weight, x = (jnp.asarray(rng.standard_normal((n, shape[1])), dtype) for n in (shape[0], rows))
    out = few_rows_matmul(x, weight, jnp.dtype(jnp.float32))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_bfloat16_is_rounded_once(kind):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 576)), jnp.bfloat16)
    if kind is None:
        weight = jnp.asarray(np.random.default_rng(0).standard_normal((64, 576)), jnp.bfloat16)
        wide = np.asarray(weight, np.float64)
    else:
        weight = quantized((64, 576), kind, jnp.bfloat16)
        wide = exact(weight)
    reference = np.asarray(x, np.float64) @ wide.T
    out = step(x, weight)
    assert out.dtype == jnp.bfloat16
    half_ulp = float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(
        np.asarray(out, np.float64), reference, rtol=1.01 * half_ulp, atol=1e-4
    )


def test_nan_and_infinity_stay():
    weight = quantized((8, 192), "4 bits, groups of 64", jnp.float32)
    x = jnp.ones((2, 192)).at[0, 5].set(jnp.nan)
    out = step(x, weight)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_one_row(value):
    weight = quantized((8, 192), "4 bits, groups of 64", jnp.float32)
    assert not np.isfinite(step(jnp.ones((1, 192)).at[0, 5].set(value), weight)).any()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_one_row_of_any_size(size):
    weight = quantized((64, 192), "4 bits, groups of 32", jnp.float32)
    x = np.random.default_rng(1).standard_normal((1, 192)) * size
    reference = x.astype(np.float32).astype(np.float64) @ exact(weight).T
    out = step(jnp.asarray(x, jnp.float32), weight)
    # numbers below the smallest normal one may be 0
    np.testing.assert_allclose(out, reference, rtol=1e-4, atol=size * 1e-4 + 1e-35)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_derivatives_are_those_of_the_widened_weight(kind):
    rng = np.random.default_rng(1)
    x, tangent = (jnp.asarray(rng.standard_normal((2, 192)), jnp.bfloat16) for _ in range(2))
    if kind is None:
        weight = jnp.asarray(rng.standard_normal((5, 192)), jnp.bfloat16)
    else:
        weight = quantized((5, 192), kind, jnp.bfloat16)
    cotangent = jnp.asarray(rng.standard_normal((2, 5)), jnp.bfloat16)
    _, forward = jax.jvp(lambda x: step(x, weight), (x,), (tangent,))
    (backward,) = jax.vjp(lambda x: step(x, weight), x)[1](cotangent)
    wide = np.asarray(weight[...], np.float64)
    np.testing.assert_allclose(
        np.asarray(forward, np.float64),
        np.asarray(tangent, np.float64) @ wide.T,
        rtol=8e-3,
        atol=0.02,
    )
    expected = np.asarray(cotangent, np.float64) @ wide
    np.testing.assert_allclose(np.asarray(backward, np.float64), expected, rtol=8e-3, atol=0.02)


def test_the_weight_of_a_bfloat16_step_has_a_gradient():
    rng = np.random.default_rng(1)
    x, weight = (jnp.asarray(rng.standard_normal((n, 64)), jnp.bfloat16) for n in (2, 5))
    gradient = jax.grad(lambda weight: step(x, weight).astype(jnp.float32).sum())(weight)
    expected = np.broadcast_to(np.asarray(x, np.float64).sum(axis=0), (5, 64))
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=8e-3)


@pytest.mark.parametrize("rows", [1, 8])
def test_the_kernel_reads_codes_without_widening_them(rows):
    """Nothing of the size of the weight is in the compiled program but the codes themselves."""
    weight = quantized((192, 576), "4 bits, groups of 64", jnp.float32)
    x = jnp.ones((rows, 576))
    program = jax.jit(step).lower(x, weight).compile().as_text()
    assert "llama_jax_few_rows" in program
    assert "f32[192,576]" not in program


def test_many_rows_and_no_numba_widen(monkeypatch):
    weight = quantized((16, 192), "8 bits", jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((9, 192)), jnp.float32)
    assert weight.in_memory(x) is None
    assert coded((16, 192), 8, 2, x.dtype).in_memory(x[:1]) is None
    monkeypatch.setattr(few_rows, "step_kernels", lambda: None)
    assert weight.in_memory(x[:1]) is None
    assert few_rows_matmul(x[:1], weight[...], x.dtype) is None
    np.testing.assert_allclose(step(x[:1], weight), x[:1] @ weight[...].T, rtol=1e-5, atol=1e-5)


def test_a_numba_that_fails_is_a_warning(monkeypatch):
    """Its own words, such as which numpy it needs, and the matmul as without it."""

    class Failing:
        def find_spec(self, name, path=None, target=None):
            if name == "llama_jax.numerics.cpu.call":
                raise ImportError("Numba needs NumPy 2.5 or less")

    monkeypatch.delitem(sys.modules, "llama_jax.numerics.cpu.call", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    with pytest.warns(UserWarning, match="numba: Numba needs NumPy"):
        assert available._kernels.__wrapped__("call") is None


def test_under_vmap():
    weight = quantized((16, 192), "8 bits", jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 192)), jnp.float32)
    outs = jax.vmap(lambda x: step(x, weight))(x)
    np.testing.assert_allclose(outs, x @ weight[...].T, rtol=1e-5, atol=1e-5)


def test_calls_from_several_threads():
    weight = quantized((512, 192), "4 bits, groups of 64", jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 192)), jnp.float32)
    run = jax.jit(step)
    expected = np.asarray(run(x, weight))
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: np.asarray(run(x, weight)), range(400)))
    for out in outs:
        np.testing.assert_array_equal(out, expected)


def test_a_process_ends_while_a_thread_waits_for_more():
    program = """
import jax, jax.numpy as jnp
from llama_jax import LlamaConfig, LlamaModel, init_cache
from llama_jax.numerics.few_rows import few_rows_matmul, multiply_in_memory, weight_in_memory
run = jax.jit(lambda x, w: few_rows_matmul(x, w, jnp.float32))
run(jnp.ones((1, 256)), jnp.ones((4096, 256))).block_until_ready()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")


def test_many_calls_at_once_end():
    """Calls that do not depend on each other: threads wait for each other's work, never for each other."""
    weights = [quantized((512, 192), "8 bits", jnp.float32) for _ in range(16)]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 192)), jnp.float32)

    @jax.jit
    def run(x, weights):
        return [step(x, weight) for weight in weights]

    for _ in range(50):
        outs = run(x, weights)
    for out in outs:
        np.testing.assert_allclose(out, x @ weights[0][...].T, rtol=1e-4, atol=1e-4)


def test_several_weights_in_one_call():
    """The same bits as one by one, whatever their dtypes and groups."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 192)), jnp.float32)
    kinds = ("4 bits, groups of 64", "4 bits, groups of 64", "8 bits", "4 bits, groups of 24")
    weights = [quantized((n, 192), kind, x.dtype).in_memory(x) for n, kind in enumerate(kinds, 5)]
    weights.append(weight_in_memory(x, jnp.ones((700, 192))))
    outs = jax.jit(lambda x: multiply_in_memory(x, weights))(x)
    for out, weight in zip(outs, weights, strict=True):
        np.testing.assert_array_equal(out, multiply_in_memory(x, [weight])[0])


def test_projections_of_a_layer_that_read_the_same_are_one_call():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_bias=True,
    )
    model = LlamaModel(config, rngs=nnx.Rngs(0))
    cache = init_cache(config, 1, 8, jnp.float32)
    run = jax.jit(lambda ids: model(ids, cache=cache).last_hidden_state)
    program = run.lower(jnp.ones((1, 1), jnp.int32)).as_text()
    assert program.count("@llama_jax_few_rows") == 4
