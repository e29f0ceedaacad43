"""fused_linear_cross_entropy: everything its docstring promises, and the edge cases."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llama_jax.loss import fused_linear_cross_entropy
from parity_tests.harness.compilation import compiler_options
from parity_tests.reference.errors import relative_error
from parity_tests.reference.tolerances import FLOAT64_BAR, ROUNDING_RATIO
from train.hardware.flops import matmul_flops

TOKENS, HIDDEN, VOCAB = 37, 8, 23  # a prime vocabulary, a last chunk that is not full
CHUNK = 8


def arrays(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, VOCAB, TOKENS)
    labels[[3, 36]] = -100
    labels[8:16] = -100  # a whole chunk
    labels[0] = VOCAB - 1
    return {
        "hidden": rng.normal(size=(TOKENS, HIDDEN)).astype(dtype),
        "kernel": rng.normal(size=(VOCAB, HIDDEN)).astype(dtype),
        "bias": rng.normal(size=VOCAB).astype(dtype),
        "scale": rng.normal(size=VOCAB).astype(dtype),
        "weights": rng.random(TOKENS).astype(dtype),
    }, labels


def run(operands, labels, wrt, **options):
    """Loss output, and gradients of a random combination of the losses with a cotangent of 7.5."""

    def objective(trained, fixed):
        out = fused_linear_cross_entropy(**trained, **fixed, labels=jnp.asarray(labels), **options)
        mix = jnp.asarray(np.random.default_rng(5).normal(size=out.loss.shape), out.loss.dtype)
        return 7.5 * jnp.sum(mix * out.loss), out

    trained = {name: jnp.asarray(operands[name]) for name in wrt}
    fixed = {name: jnp.asarray(value) for name, value in operands.items() if name not in wrt}
    gradient = jax.grad(objective, has_aux=True)
    fast = compiler_options(operands["hidden"].dtype)
    gradients, out = jax.jit(gradient, compiler_options=fast)(trained, fixed)
    return out, gradients


OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 0.02},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "div_factor": {"loss_div_factor": 3.0},
    "all": {"z_loss": 0.02, "label_smoothing": 0.1, "softcap": 3.0, "loss_div_factor": 3.0},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_plain_formula_in_float64(name, reduction):
    operands, labels = arrays()
    if name in ("plain", "z_loss"):
        operands = {key: operands[key] for key in ("hidden", "kernel")}
    with jax.enable_x64(True):
        options = OPTIONS[name] | {"reduction": reduction, "chunk": CHUNK}
        (expected, expected_gradients), *results = (
            run(operands, labels, list(operands), mode=mode, **options)
            for mode in ("reference", "auto", "recompute")
        )
    for out, gradients in results:
        for field in ("loss", "ce_loss", "z_loss"):
            np.testing.assert_allclose(
                getattr(out, field), getattr(expected, field), rtol=1e-12, atol=1e-13
            )
        assert out.num_tokens == (labels != -100).sum()
        np.testing.assert_allclose(out.loss, out.ce_loss + out.z_loss, rtol=1e-12)
        for key in gradients:
            assert relative_error(gradients[key], expected_gradients[key]) <= FLOAT64_BAR, key


@pytest.mark.parametrize("frozen", ["hidden", "kernel", "bias", "scale", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_with_one_argument_frozen(frozen, reduction):
    operands, labels = arrays()
    wrt = [name for name in operands if name != frozen]
    with jax.enable_x64(True):
        _, gradients = run(operands, labels, wrt, reduction=reduction, chunk=CHUNK, z_loss=0.01)
        _, expected_gradients = run(
            operands, labels, wrt, reduction=reduction, mode="reference", z_loss=0.01
        )
    for key in wrt:
        assert relative_error(gradients[key], expected_gradients[key]) <= FLOAT64_BAR, key


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_value_and_gradients_match_torch(reduction, smoothing, ignore_index):
    operands, labels = arrays()
    labels = np.where(labels == -100, ignore_index, labels)
    tensors = {
        key: torch.from_numpy(operands[key]).requires_grad_()
        for key in ("hidden", "kernel", "bias")
    }
    logits = tensors["hidden"] @ tensors["kernel"].T + tensors["bias"]
    expected = torch.nn.functional.cross_entropy(
        logits,
        torch.from_numpy(labels),
        reduction=reduction,
        label_smoothing=smoothing,
        ignore_index=ignore_index,
    )
    mix = torch.from_numpy(np.random.default_rng(5).normal(size=tuple(expected.shape)))
    (7.5 * (mix * expected).sum()).backward()
    with jax.enable_x64(True):
        operands = {key: operands[key] for key in tensors}
        out, gradients = run(
            operands,
            labels,
            list(operands),
            reduction=reduction,
            label_smoothing=smoothing,
            ignore_index=ignore_index,
            chunk=CHUNK,
        )
    np.testing.assert_allclose(out.loss, expected.detach().numpy(), rtol=1e-12, atol=1e-13)
    for key, tensor in tensors.items():
        assert relative_error(gradients[key], tensor.grad) <= 1e-12, key


def test_z_loss_is_the_squared_logsumexp_and_off_for_none_and_zero():
    operands, labels = arrays()
    hidden, kernel = operands["hidden"], operands["kernel"]
    lse = np.log(np.exp(hidden @ kernel.T).sum(-1))
    valid = labels != -100
    with jax.enable_x64(True):
        for multiplier in (None, 0.0, 1e-4, 2):
            out = fused_linear_cross_entropy(hidden, kernel, labels, z_loss=multiplier)
            expected = (multiplier or 0) * (lse[valid] ** 2).mean()
            np.testing.assert_allclose(out.z_loss, expected, rtol=1e-12)
            assert (out.z_loss == 0) == (not multiplier)


def test_ce_and_z_carry_no_gradient():
    operands, labels = arrays(np.float32)
    for field in ("ce_loss", "z_loss"):
        gradient = jax.grad(
            lambda h, field=field: getattr(
                fused_linear_cross_entropy(h, jnp.asarray(operands["kernel"]), labels, z_loss=0.1),
                field,
            )
        )(jnp.asarray(operands["hidden"]))
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_label_is_zero_with_zero_gradients(reduction):
    operands, labels = arrays(np.float32)
    out, gradients = run(
        operands, np.full_like(labels, -100), list(operands), reduction=reduction, z_loss=0.1
    )
    assert (out.loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("mode", ["auto", "recompute", "reference"])
def test_values_in_ignored_rows_do_not_leak(poison, mode):
    operands, labels = arrays(np.float32)
    expected, expected_gradients = run(
        operands, labels, ["hidden", "kernel", "scale"], mode=mode, chunk=CHUNK
    )
    operands["hidden"][labels == -100] = poison
    out, gradients = run(operands, labels, ["hidden", "kernel", "scale"], mode=mode, chunk=CHUNK)
    assert out.loss == expected.loss
    for key in gradients:
        np.testing.assert_array_equal(gradients[key], expected_gradients[key])


@pytest.mark.parametrize("chunk", [1, 5, 37, 64, None])
def test_the_chunk_size_only_changes_rounding(chunk):
    operands, labels = arrays()
    with jax.enable_x64(True):
        out, gradients = run(operands, labels, list(operands), chunk=chunk)
        expected, expected_gradients = run(operands, labels, list(operands), mode="reference")
    np.testing.assert_allclose(out.loss, expected.loss, rtol=1e-12)
    for key in gradients:
        assert relative_error(gradients[key], expected_gradients[key]) <= FLOAT64_BAR


def test_one_token_and_leading_dimensions():
    operands, labels = arrays(np.float32)
    hidden, kernel = operands["hidden"], operands["kernel"]
    one = fused_linear_cross_entropy(hidden[:1], kernel, labels[:1], reduction="none")
    assert one.loss.shape == (1,)
    folded = fused_linear_cross_entropy(
        hidden[:36].reshape(2, 3, 6, HIDDEN), kernel, labels[:36].reshape(2, 3, 6), reduction="none"
    )
    flat = fused_linear_cross_entropy(hidden[:36], kernel, labels[:36], reduction="none")
    np.testing.assert_allclose(folded.loss.ravel(), flat.loss, rtol=1e-6)


def test_either_layout_of_the_kernel_and_a_square_one():
    operands, labels = arrays(np.float32)
    hidden, kernel = operands["hidden"], operands["kernel"]
    one = fused_linear_cross_entropy(hidden, kernel, labels).loss
    np.testing.assert_allclose(fused_linear_cross_entropy(hidden, kernel.T, labels).loss, one, 1e-6)
    square = np.random.default_rng(0).normal(size=(HIDDEN, HIDDEN)).astype(np.float32)
    labels = labels.clip(0, HIDDEN - 1)
    first = fused_linear_cross_entropy(hidden, square, labels, vocab_axis=0).loss
    second = fused_linear_cross_entropy(hidden, square.T, labels, vocab_axis=1).loss
    np.testing.assert_allclose(first, second, rtol=1e-6)
    with pytest.raises(ValueError, match="vocab_axis: found None"):
        fused_linear_cross_entropy(hidden, square, labels)


def test_microbatches_add_up_to_the_full_batch():
    operands, labels = arrays()
    with jax.enable_x64(True):
        valid = (labels != -100).sum()
        full, gradient = run(operands, labels, ["kernel"], loss_div_factor=1.0)
        parts = []
        for rows in (slice(0, 20), slice(20, None)):
            part = {k: v[rows] if k in ("hidden", "weights") else v for k, v in operands.items()}
            options = {"reduction": "sum", "loss_div_factor": float(valid)}
            parts.append(run(part, labels[rows], ["kernel"], **options))
        losses = [float(out.loss) for out, _ in parts]
        np.testing.assert_allclose(sum(losses), full.loss, rtol=1e-12)
        total = sum(np.asarray(g["kernel"]) for _, g in parts)
        assert relative_error(total, gradient["kernel"]) <= 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_large_logits_in_low_precision(dtype):
    """|logit| = 160 and a probability near 1: float32 accumulation in both passes keeps them."""
    hidden = jnp.asarray([[40.0, 1.0], [40.0, -1.0], [2.0, 1.0]], dtype)
    kernel = jnp.asarray([[4.0, 0.0], [3.9, 0.1], [-4.0, 1.0]], dtype)
    labels = jnp.asarray([0, 1, 0])

    def loss(h, k, mode="auto"):
        return fused_linear_cross_entropy(h, k, labels, reduction="sum", mode=mode).loss

    got = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    wide = (hidden.astype(jnp.float32), kernel.astype(jnp.float32))
    expected = jax.value_and_grad(lambda h, k: loss(h, k, "reference"), argnums=(0, 1))(*wide)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    ulp = float(jnp.finfo(dtype).eps)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert ours.dtype == dtype
        bound = 2 * ulp * np.abs(theirs).max()
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=bound)


def test_mixed_dtypes_keep_their_own_gradients():
    operands, labels = arrays(np.float32)
    hidden, kernel = jnp.asarray(operands["hidden"], jnp.bfloat16), jnp.asarray(operands["kernel"])
    gradients = jax.grad(
        lambda h, k: fused_linear_cross_entropy(h, k, labels).loss, argnums=(0, 1)
    )(hidden, kernel)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("wrong", [VOCAB, -1, 10**6])
@pytest.mark.parametrize("mode", ["auto", "recompute", "reference"])
def test_a_label_outside_the_vocabulary(wrong, mode):
    operands, labels = arrays(np.float32)
    labels[5] = wrong
    hidden, kernel = operands["hidden"], operands["kernel"]
    with pytest.raises(ValueError, match=f"labels: found {wrong}, expected -100 or 0 to 22"):
        fused_linear_cross_entropy(hidden, kernel, labels, mode=mode)
    under_jit = jax.jit(lambda lab: fused_linear_cross_entropy(hidden, kernel, lab, mode=mode).loss)
    assert np.isnan(under_jit(labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(TOKENS)}, "labels: found float64, expected an integer dtype"),
        ({"labels": np.zeros(3, int)}, "labels: found shape [3], expected [37]"),
        ({"reduction": "avg"}, "reduction: found 'avg', expected 'mean', 'sum' or 'none'"),
        ({"chunk": 0}, "chunk: found 0, expected a positive integer"),
        ({"chunk": 2.0}, "chunk: found 2.0"),
        ({"weights": np.ones(3), "reduction": "none"}, "weights: found shape [3], expected [37]"),
        ({"bias": np.ones(3)}, "bias: found shape [3], expected [23]"),
        ({"scale": np.ones(3)}, "scale: found shape [3], expected a scalar or [23]"),
        ({"kernel": np.ones((5, 6), np.float32)}, "kernel: found shape [5, 6], expected [8, V]"),
        ({"kernel": np.ones((23, 8), np.int32)}, "kernel: found int32, expected a floating"),
        ({"label_smoothing": 1.5}, "label_smoothing: found 1.5"),
        ({"z_loss": -1.0}, "z_loss: found -1.0"),
        ({"softcap": 0.0}, "softcap: found 0.0"),
        ({"mode": "fast"}, "mode: found 'fast'"),
        ({"vocab_axis": 1}, "vocab_axis: found 1"),
    ],
)
def test_the_error_names_the_bad_argument(change, message):
    operands, labels = arrays(np.float32)
    call = {"hidden": operands["hidden"], "kernel": operands["kernel"], "labels": labels} | change
    with pytest.raises(ValueError) as caught:
        fused_linear_cross_entropy(**call)
    assert message in str(caught.value)


def test_it_composes_with_vmap_scan_and_checkpoint():
    operands, labels = arrays(np.float32)
    hidden, kernel = jnp.asarray(operands["hidden"][:36]), jnp.asarray(operands["kernel"])
    stacked, rows = hidden.reshape(3, 12, HIDDEN), jnp.asarray(labels[:36].reshape(3, 12))

    def one(kernel, h, lab):
        return fused_linear_cross_entropy(h, kernel, lab, reduction="sum", chunk=5).loss

    expected = jax.grad(lambda k: one(k, hidden, rows.ravel()))(kernel)
    transformed = {
        "vmap": lambda k: jax.vmap(one, (None, 0, 0))(k, stacked, rows).sum(),
        "scan": lambda k: jax.lax.scan(
            lambda total, x: (total + one(k, *x), None), 0.0, (stacked, rows)
        )[0],
        "checkpoint": lambda k: jax.checkpoint(one)(k, hidden, rows.ravel()),
    }
    for name, objective in transformed.items():
        np.testing.assert_allclose(
            jax.jit(jax.grad(objective))(kernel), expected, rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_donated_buffers_change_nothing():
    operands, labels = arrays(np.float32)

    def update(hidden, kernel):
        def loss(kernel):
            return fused_linear_cross_entropy(hidden, kernel, jnp.asarray(labels), chunk=8).loss

        return kernel - 0.1 * jax.grad(loss)(kernel)

    expected = jax.jit(update)(operands["hidden"], operands["kernel"])
    donated = jnp.array(operands["kernel"])
    got = jax.jit(update, donate_argnums=1)(operands["hidden"], donated)
    assert donated.is_deleted()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["auto", "recompute", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_infinite_loss_is_infinite(reduction, mode):
    """As torch's: a token that the bias forbids has an infinite loss, not NaN."""
    operands, labels = arrays(np.float32)
    bias = np.zeros(VOCAB, np.float32)
    bias[labels[0]] = -np.inf
    out = fused_linear_cross_entropy(
        operands["hidden"], operands["kernel"], labels, bias=bias, reduction=reduction, mode=mode
    )
    assert out.loss == np.inf


PLAIN_PROGRAM = """
import jax, jax.numpy as jnp
from llama_jax import fused_linear_cross_entropy

def loss(w, x, y):
    return fused_linear_cross_entropy(x, w["head"], y).loss

x, y = jnp.ones((6, 4)), jnp.arange(6)
w = {"head": jnp.zeros((4, 9))}
value, gradient = jax.jit(jax.value_and_grad(loss))(w, x, y)
assert abs(value - jnp.log(9)) < 1e-6 and gradient["head"].shape == (4, 9)
"""


def test_a_plain_jax_program_uses_it():
    subprocess.run([sys.executable, "-W", "error", "-c", PLAIN_PROGRAM], check=True)


def test_the_reference_mode_has_forward_derivatives_and_hessians():
    operands, labels = arrays(np.float32)
    hidden = jnp.asarray(operands["hidden"])

    def loss(kernel):
        return fused_linear_cross_entropy(hidden, kernel, labels, mode="reference").loss

    kernel = jnp.asarray(operands["kernel"])
    _, tangent = jax.jvp(loss, (kernel,), (kernel,))
    np.testing.assert_allclose(tangent, (jax.grad(loss)(kernel) * kernel).sum(), rtol=1e-4)
    assert np.isfinite(jax.hessian(loss)(kernel)).all()


# Costs --------------------------------------------------------------------------------------------

T, H, V = 8192, 512, 32000
NAIVE_BYTES = 2 * T * V * 4  # logits and their gradient


def step(argnums, **options):
    def loss(hidden, kernel, labels):
        out = fused_linear_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(out.loss)

    return jax.value_and_grad(loss, argnums=argnums) if argnums else loss


def shapes(tokens):
    return (
        jax.ShapeDtypeStruct((tokens, H), jnp.float32),
        jax.ShapeDtypeStruct((V, H), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


@pytest.mark.parametrize(
    ("argnums", "options", "expected"),
    [
        ((0, 1), {}, 3),
        ((0, 1), {"reduction": "sum"}, 3),
        ((0, 1), {"reduction": "none"}, 4),
        ((0, 1), {"mode": "recompute"}, 4),
        ((0,), {}, 2),
        ((0,), {"reduction": "none"}, 2),
        ((1,), {}, 2),
        ((), {}, 1),
    ],
)
def test_matmul_flops_of_each_mode(argnums, options, expected):
    jaxpr = jax.make_jaxpr(step(argnums, **options))(*shapes(T))
    unit = 2 * T * H * V
    assert matmul_flops(jaxpr.jaxpr) == pytest.approx(expected * unit, rel=0.01)


@pytest.mark.parametrize(
    ("argnums", "chunk", "share"), [((0, 1), 512, 0.065), ((0, 1), 128, 0.04), ((0,), 128, 0.017)]
)
def test_memory_is_a_few_percent_of_the_naive_loss_and_does_not_grow(argnums, chunk, share):
    sizes = []
    for tokens in (T, 8 * T):
        compiled = jax.jit(step(argnums, chunk=chunk)).lower(*shapes(tokens)).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
        assert f"[{tokens},{V}]" not in compiled.as_text()
    assert sizes[0] <= share * NAIVE_BYTES
    assert sizes[1] <= 1.05 * sizes[0]


def test_bfloat16_gradients_are_as_accurate_as_the_naive_loss():
    """Error against float32 of the same bfloat16 inputs, at most 1.1 times the plain program's.

    The plain program: a bfloat16 projection, its logits then made float32. (One that also keeps float32
    deltas in its backward products rounds less than any that casts them, by 1.2 here, and runs them on
    the slow path.)
    """
    errors = {"ours": np.zeros(2), "naive": np.zeros(2)}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        hidden = jnp.asarray(rng.normal(size=(256, 64)), jnp.bfloat16)
        kernel = jnp.asarray(rng.normal(size=(500, 64)) / 8, jnp.bfloat16)
        labels = jnp.asarray(rng.integers(0, 500, 256))

        def naive(h, k, labels=labels):
            logits = (h @ k.T).astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
            return 0.37 * jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

        def ours(h, k, labels=labels):
            out = fused_linear_cross_entropy(h, k, labels, chunk=64)
            return 0.37 * out.loss

        wide = hidden.astype(jnp.float32), kernel.astype(jnp.float32)
        truth = jax.grad(naive, argnums=(0, 1))(*wide)
        for name, function in (("ours", ours), ("naive", naive)):
            got = jax.jit(jax.grad(function, argnums=(0, 1)))(hidden, kernel)
            errors[name] += [
                float(jnp.sum((g.astype(jnp.float32) - t) ** 2))
                for g, t in zip(got, truth, strict=True)
            ]
    assert (np.sqrt(errors["ours"]) <= 1.1 * np.sqrt(errors["naive"])).all(), errors


def test_float32_is_as_accurate_as_the_naive_loss():
    """Error against float64, pooled over seeds, no larger than that of the plain float32 program."""
    errors = {"auto": [], "naive": []}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        hidden, kernel = rng.normal(size=(256, 64)), rng.normal(size=(500, 64)) / 8
        labels = rng.integers(0, 500, 256)

        def naive(h, k, labels=labels):
            logits = h @ k.T
            chosen = jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=-1)[:, 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

        def ours(h, k, labels=labels):
            return fused_linear_cross_entropy(h, k, jnp.asarray(labels), chunk=64).loss

        with jax.enable_x64(True):
            arguments = jnp.asarray(hidden), jnp.asarray(kernel)
            truth = jax.tree.leaves(jax.value_and_grad(naive, argnums=(0, 1))(*arguments))
        for name, function in (("auto", ours), ("naive", naive)):
            wide = jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
            got = jax.tree.leaves(jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*wide))
            errors[name].append(
                [
                    np.sum((np.asarray(g, float) - np.asarray(t)) ** 2)
                    for g, t in zip(got, truth, strict=True)
                ]
            )
    ours, naive = (np.sqrt(np.sum(errors[name], axis=0)) for name in ("auto", "naive"))
    assert (ours[1:] <= 1.02 * naive[1:]).all()  # the same matmuls, in another order
    assert ours[0] <= ROUNDING_RATIO * naive[0]  # one number a seed
