"""Matmuls of many rows on a CPU: the kernel's results, its derivatives, and what is left to XLA."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax.numerics import many_rows, matmul
from llama_jax.numerics.cpu.available import tiled_kernel
from llama_jax.numerics.matmul import einsum, wide_einsum
from parity_tests.reference.errors import rms_error
from parity_tests.reference.tolerances import ROUNDING_RATIO

KERNEL = tiled_kernel()
pytestmark = pytest.mark.skipif(KERNEL is None, reason="no numba, no AVX-512, or AMD")

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
DTYPES = [
    FLOAT32,
    pytest.param(
        BFLOAT16,
        marks=pytest.mark.skipif(KERNEL is None or not KERNEL.HAS_AMX, reason="no AMX"),
    ),
]
# every layout of both operands, a result that is transposed, and batches with several indices
SPECS = {
    "mk,kn->mn": ((672, 544), (544, 1056)),
    "mk,nk->mn": ((672, 1056), (544, 1056)),
    "km,kn->mn": ((1056, 672), (1056, 544)),
    "km,nk->mn": ((544, 672), (544, 544)),
    "mk,nk->nm": ((672, 544), (544, 544)),
    "bngqd,bnkd->bngqk": ((2, 3, 2, 64, 64), (2, 3, 160, 64)),
    "bngqk,bnkd->bngqd": ((2, 3, 2, 64, 160), (2, 3, 160, 64)),
    "bnqk,bnqd->bnkd": ((2, 3, 128, 160), (2, 3, 128, 64)),
}


def operands(spec: str, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in SPECS[spec])
    return a, b


def exact(spec: str, a: jax.Array, b: jax.Array) -> np.ndarray:
    return np.einsum(spec, np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_layout(spec, dtype):
    a, b = operands(spec, dtype)
    assert many_rows.takes_many_rows(spec, a, b)
    truth = exact(spec, a, b)
    wide = jax.jit(lambda a, b: wide_einsum(spec, a, b, FLOAT32))(a, b)
    assert wide.dtype == FLOAT32
    np.testing.assert_allclose(wide, truth, rtol=1e-4, atol=2e-6 * np.abs(truth).max())
    rounded = jax.jit(lambda a, b: einsum(spec, a, b))(a, b)
    assert rounded.dtype == dtype
    if dtype == BFLOAT16:  # once: as XLA rounds the same sums
        assert jnp.array_equal(rounded, wide.astype(dtype))


@pytest.mark.parametrize("rows", [32, 44, 516, 2048])
def test_float32_rounds_no_more_than_torch(rows):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, 1536), (576, 1536)))
    ours = jax.jit(lambda x, w: einsum("ti,oi->to", x, w))(jnp.asarray(x), jnp.asarray(w))
    truth = x.astype(np.float64) @ w.astype(np.float64).T
    theirs = (torch.from_numpy(x) @ torch.from_numpy(w).T).numpy()
    assert rms_error(np.asarray(ours), truth) <= ROUNDING_RATIO * rms_error(theirs, truth)


def test_one_large_token_rounds_no_more_than_in_torch():
    """As the first one often is: sums after it are rounded like it. With sums of 192 a report had 1.47."""
    rng = np.random.default_rng(0)
    d_out, x = (rng.standard_normal((2000, n)).astype(np.float32) for n in (192, 576))
    d_out[0] *= 30
    x[0] *= 300
    ours = einsum("to,ti->oi", jnp.asarray(d_out), jnp.asarray(x))
    truth = d_out.astype(np.float64).T @ x.astype(np.float64)
    theirs = (torch.from_numpy(d_out).T @ torch.from_numpy(x)).numpy()
    assert rms_error(np.asarray(ours), truth) <= rms_error(theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_how_the_result_is_divided(dtype):
    """Between blocks, and so between any number of threads."""
    a, b = operands("mk,nk->mn", dtype)
    run = jax.jit(lambda a, b: einsum("mk,nk->mn", a, b))
    complete = run(a, b)
    assert jnp.array_equal(run(a[:96], b), complete[:96])
    assert jnp.array_equal(run(a, b[:64]), complete[:, :64])


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_from_several_threads(dtype):
    a, b = operands("mk,kn->mn", dtype)
    run = jax.jit(lambda a, b: [einsum("mk,kn->mn", a * scale, b) for scale in (1, 2, 4)])
    expected = run(a, b)
    assert jnp.array_equal(expected[2], 4 * expected[0])
    with ThreadPoolExecutor(4) as pool:
        for outs in pool.map(lambda _: run(a, b), range(20)):
            assert all(map(jnp.array_equal, outs, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["mk,nk->mn", "bngqk,bnkd->bngqd"])
def test_derivatives_are_those_of_the_einsum(spec, dtype):
    a, b = operands(spec, dtype)
    rng = np.random.default_rng(1)
    tangents = tuple(jnp.asarray(rng.standard_normal(x.shape), dtype) for x in (a, b))

    def by_kernel(a, b):
        return wide_einsum(spec, a, b, FLOAT32)

    def plain(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=FLOAT32)

    results = []
    for function in (by_kernel, plain):
        value, forward = jax.jvp(function, (a, b), tangents)
        _, transpose = jax.vjp(function, a, b)
        batched = jax.vmap(function, (0, None))(jnp.stack([a, 2 * a]), b)
        results.append([forward, *transpose(value), batched])
    for ours, right in zip(*results, strict=True):
        assert ours.dtype == right.dtype
        right = np.asarray(right, np.float64)
        largest = np.abs(right).max() * float(jnp.finfo(ours.dtype).eps)
        np.testing.assert_allclose(np.asarray(ours, np.float64), right, atol=8 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay(dtype):
    a, b = operands("mk,nk->mn", dtype)
    out = einsum("mk,nk->mn", a.at[3, 5].set(jnp.nan).at[4, 6].set(jnp.inf), jnp.abs(b) + 1)
    assert jnp.isnan(out[3]).all()
    assert jnp.isposinf(out[4]).all()
    assert jnp.isfinite(out[5:]).all()


def test_what_is_left_to_xla(monkeypatch):
    def takes(spec, a, b, dtype=FLOAT32):
        return many_rows.takes_many_rows(
            spec, jax.ShapeDtypeStruct(a, dtype), jax.ShapeDtypeStruct(b, dtype)
        )

    matrix = 512, 512
    assert takes("mk,nk->mn", matrix, matrix)
    assert not takes("mk,nk->mn", matrix, matrix, jnp.dtype(jnp.float16))
    assert not takes("mk,nk->mn", matrix, matrix, jnp.dtype(jnp.float64))
    assert not takes("mk,nk->mn", (510, 512), matrix)  # no multiple of what the kernel computes
    assert not takes("mk,nk->mn", matrix, (500, 512))
    assert not takes("mk,nk->mn", (512, 500), (512, 500))
    assert not takes("mk,nk->mn", (16, 512), matrix)  # few rows
    assert not takes("mk,nk->mn", (64, 64), (64, 64))  # small
    assert not takes("bqnd,bknd->bnqk", (2, 256, 4, 64), (2, 256, 4, 64))  # needs a transpose
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert not takes("mk,nk->mn", matrix, matrix)
    monkeypatch.setattr(many_rows, "tiled_kernel", lambda: None)
    assert not takes("mk,nk->mn", matrix, matrix)


def test_programs_show_the_matmuls():
    """To those who count them, such as `train.hardware.flops`."""
    a, b = operands("mk,nk->mn", FLOAT32)
    jaxpr = str(jax.make_jaxpr(lambda a, b: einsum("mk,nk->mn", a, b))(a, b))
    assert jaxpr.count("dot_general[") == 1
    program = jax.jit(lambda a, b: einsum("mk,nk->mn", a, b)).lower(a, b).compile().as_text()
    assert "llama_jax_tiled_matmul" in program


def test_without_the_kernel_it_is_the_same_function(monkeypatch):
    a, b = operands("mk,nk->mn", FLOAT32)
    ours = einsum("mk,nk->mn", a, b)
    monkeypatch.setattr(matmul, "takes_many_rows", lambda *_: False)
    np.testing.assert_allclose(einsum("mk,nk->mn", a, b), ours, atol=2e-4)


def test_it_compiles_for_a_processor_without_amx(tmp_path):
    """LLVM ends the process if an instruction is missing."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    names = (
        ("+" if has and not name.startswith("amx") else "-") + name
        for name, has in features.items()
    )
    program = """
from llvmlite import binding
features = binding.get_host_cpu_features()
features |= {name: False for name in features if name.startswith("amx")}
binding.get_host_cpu_features = lambda: features
from llama_jax.numerics.cpu.tiled_call import HAS_AMX
assert not HAS_AMX
"""
    variables = {
        "XDG_CACHE_HOME": str(tmp_path),
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": ",".join(names),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | variables,
        capture_output=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_llvm_that_fails_leaves_all_to_xla(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert tiled_kernel.__wrapped__() is None
