"""Matmuls: exact gradients in every dtype, and no more rounding than PyTorch's at real widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax.models.layers import linear
from llama_jax.numerics import few_rows, matmul
from llama_jax.numerics.matmul import einsum
from parity_tests.reference.errors import rms_error
from parity_tests.reference.tolerances import ROUNDING_RATIO

SPECS = ["ti,oi->to", "bqngd,bknd->bngqk", "bngqk,bknd->bqngd", "bsh,vh->bsv"]
SIZES = dict(zip("tiobqngdkshv", (3, 5, 4, 2, 3, 2, 2, 4, 5, 3, 6, 7), strict=True))


@pytest.fixture(params=["by the kernel, if there is one", "by XLA"])
def either_way(request, monkeypatch):
    """Both ways to a float32 matmul."""
    if request.param == "by XLA":
        monkeypatch.setattr(matmul, "takes_many_rows", lambda *_: False)


def operands(spec: str, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [[SIZES[letter] for letter in part] for part in spec.split("->")[0].split(",")]
    first, second = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return first, second


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradients_are_float32_matmuls_rounded_once(spec, dtype):
    a, b = operands(spec, dtype)

    def wide(a, b):
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))

    value, transpose = jax.vjp(lambda a, b: einsum(spec, a, b), a, b)
    exact, exact_transpose = jax.vjp(wide, a, b)
    assert value.dtype == dtype
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=ulp, atol=1e-6)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), dtype)
    for ours, theirs in zip(
        transpose(cotangent), exact_transpose(cotangent.astype(jnp.float32)), strict=True
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=ulp, atol=1e-6
        )


def test_operands_of_two_dtypes_are_an_error():
    with pytest.raises(ValueError, match="found float32 and bfloat16"):
        einsum("ti,oi->to", jnp.ones((2, 3)), jnp.ones((4, 3), jnp.bfloat16))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("rows", [2, 4, 15, 64])
@pytest.mark.parametrize(("depth", "width"), [(576, 1536), (1536, 576), (2048, 512), (4096, 256)])
def test_float32_rounds_no_more_than_torch_at_real_widths(rows, depth, width):
    """One matmul. XLA's own on the CPU has a ratio of 1.5 here."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((rows, depth)).astype(np.float32)
    b = rng.standard_normal((width, depth)).astype(np.float32)
    truth = a.astype(np.float64) @ b.astype(np.float64).T
    ours = rms_error([np.asarray(jax.jit(lambda a, b: einsum("ti,oi->to", a, b))(a, b))], [truth])
    theirs = rms_error([(torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()], [truth])
    assert ours <= ROUNDING_RATIO * theirs


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("depth", "width"), [(576, 192), (576, 576)])
def test_gradient_of_the_input_rounds_no_more_than_torchs(depth, width):
    """Projections of attention. As one matmul, that of the square one has a ratio of 1.5."""
    rng = np.random.default_rng(0)
    shapes = ((256, depth), (width, depth), (256, width))
    x, weight, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    _, transpose = jax.vjp(lambda x: einsum("ti,oi->to", x, jnp.asarray(weight)), jnp.asarray(x))
    (ours,) = jax.jit(transpose)(jnp.asarray(cotangent))
    theirs = (torch.from_numpy(cotangent) @ torch.from_numpy(weight)).numpy()
    exact = cotangent.astype(np.float64) @ weight.astype(np.float64)
    assert rms_error(np.asarray(ours), exact) <= ROUNDING_RATIO * rms_error(theirs, exact)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize(("depth", "width"), [(576, 192), (704, 256), (1536, 576)])
def test_gradient_of_the_weight_rounds_no_more_than_torchs(tokens, depth, width):
    """A sum over tokens. As one matmul, it has a ratio of up to 1.7 on AMD."""
    rng = np.random.default_rng(0)
    shapes = ((tokens, depth), (width, depth), (tokens, width))
    x, weight, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    _, transpose = jax.vjp(lambda w: einsum("ti,oi->to", jnp.asarray(x), w), jnp.asarray(weight))
    (ours,) = jax.jit(transpose)(jnp.asarray(cotangent))
    theirs = (torch.from_numpy(cotangent).T @ torch.from_numpy(x)).numpy()
    exact = cotangent.astype(np.float64).T @ x.astype(np.float64)
    assert rms_error(np.asarray(ours), exact) <= ROUNDING_RATIO * rms_error(theirs, exact)


@pytest.mark.parametrize("batched", [(0, None), (None, 1), (1, 0)])
def test_sums_of_blocks_have_batches(batched):
    rng = np.random.default_rng(0)
    shapes = [(20, 288), (16, 288)]
    shapes = [
        shape if axis is None else (*shape[:axis], 3, *shape[axis:])
        for shape, axis in zip(shapes, batched, strict=True)
    ]
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def function(a, b):
        return jnp.sum(jnp.sin(einsum("ti,oi->to", a, b)))

    def plain(a, b):
        return jnp.sum(jnp.sin(jnp.einsum("ti,oi->to", a, b)))

    gradients = (jax.vmap(jax.grad(of, argnums=(0, 1)), batched)(a, b) for of in (function, plain))
    for ours, right in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [288, 577])  # blocks of one size, and a last one that is smaller
@pytest.mark.parametrize("spec", ["ti,oi->to", "bngqk,bknd->bqngd"])
def test_sums_of_blocks_have_all_derivatives(spec, depth):
    rng = np.random.default_rng(0)
    sizes = SIZES | {"i" if "i" in spec else "k": depth, "t": 20, "q": 20}
    a, b, d_a, d_b = (
        rng.normal(size=[sizes[letter] for letter in part])
        for part in 2 * spec.split("->")[0].split(",")
    )

    def function(a, b):
        return jnp.sum(jnp.sin(einsum(spec, a, b) / depth))

    def derivatives(dtype):
        primals, tangents = (
            tuple(jnp.asarray(x, dtype) for x in pair) for pair in ((a, b), (d_a, d_b))
        )
        gradient = jax.grad(function, argnums=(0, 1))
        return [
            *jax.jvp(function, primals, tangents),
            *gradient(*primals),
            *jax.jvp(gradient, primals, tangents)[1],
            jax.grad(function, argnums=1)(*primals),
        ]

    found = derivatives(jnp.float32)
    with jax.enable_x64(True):
        exact = [np.asarray(array) for array in derivatives(jnp.float64)]
    for ours, right in zip(found, exact, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-6 * np.abs(right).max())


def test_gradients_over_a_mesh_are_plain_matmuls():
    """To cut blocks from tokens that are split over devices, XLA would gather them."""
    x, weight = jnp.ones((1024, 288)), jnp.ones((288, 288))

    def loss(x, weight):
        return jnp.sum(einsum("ti,oi->to", x, weight))

    def count():
        gradient = jax.value_and_grad(loss, argnums=(0, 1))
        return str(jax.make_jaxpr(gradient)(x, weight)).count("sum_of_blocks[")

    assert count() == 3
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert count() == 1


def test_a_sum_of_blocks_holds_one_sum(monkeypatch):
    monkeypatch.setattr(matmul, "takes_many_rows", lambda *_: False)
    rows, depth, width = 512, 1152, 768
    a, b = jnp.ones((rows, depth)), jnp.ones((width, depth))
    program = jax.jit(lambda a, b: einsum("ti,oi->to", a, b)).lower(a, b).compile()
    assert "while" in program.as_text()
    blocks = (rows + width) * 192 * 4  # of the operands, copied
    assert program.memory_analysis().temp_size_in_bytes < 2.1 * rows * width * 4 + blocks


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_step_of_decoding_on_a_gpu_is_sums_of_rows(monkeypatch, dtype, rows):
    """Up to eight rows are no matmul there; with and without a bias they round once, as a matmul does."""
    monkeypatch.setattr(few_rows, "target_platform", lambda: "gpu")
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weight, bias = (
            jnp.asarray(rng.normal(size=size), dtype) for size in [(rows, 1, 40), (24, 40), 24]
        )
        for added in (None, bias):
            exact = x.astype(jnp.float64) @ weight.astype(jnp.float64).T
            exact = exact if added is None else exact + added.astype(jnp.float64)[None, None]
            out = linear(x, weight, added)
            assert (out.dtype, out.shape) == (dtype, (rows, 1, 24))
            once = float(jnp.finfo(dtype).eps)
            summed = 40 * float(jnp.finfo(matmul.working_dtype(jnp.dtype(dtype))).eps)
            np.testing.assert_allclose(out.astype(jnp.float64), exact, rtol=once, atol=summed)
            jaxpr = str(jax.make_jaxpr(lambda x, w, b=added: linear(x, w, b))(x, weight))
            assert ("dot_general" in jaxpr) == (rows > 8)
