"""The training step: micro-batches add up to the batch, and dtypes are as requested."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parity_tests.harness.compilation import FAST_COMPILE
from parity_tests.reference.errors import relative_error
from parity_tests.train.program.test_optimizer import OPTIONS, batch, named, params_of
from train.program.optimizer import make_optimizer
from train.program.step import make_evaluation, make_step


def test_accumulation_is_the_full_batch() -> None:
    """With labels ignored in some rows, so that a mean of means would be wrong."""
    with jax.enable_x64(True):
        graphdef, params = params_of(jnp.float64)
        rule = make_optimizer("adamw", 1e-2, **OPTIONS)
        step = jax.jit(
            make_step(graphdef, rule, compute_dtype=jnp.float64, z_loss=0.01),
            compiler_options=FAST_COMPILE,
        )
        full_batch = batch(rows=4)
        full_batch.labels[0, :2, 3:] = -100
        results = []
        for micro in (1, 2, 4):
            split = partial(np.reshape, shape=(micro, 4 // micro, -1))
            parts = jax.tree.map(split, full_batch)
            updated, state, metrics = step(params, rule.init(params), parts, None)
            results.append(jax.tree.leaves((updated, state, metrics)))
        assert int(results[0][-1]) == int((full_batch.labels != -100).sum())
        for other in results[1:]:
            worst = max(relative_error(a, b) for a, b in zip(other, results[0], strict=True))
            print(f"accumulation: {worst:.1e}")
            assert worst <= 1e-12


def test_a_batch_without_labels_changes_nothing() -> None:
    graphdef, params = params_of()
    rule = make_optimizer("sgd", 1e-2, **OPTIONS | {"weight_decay": 0.0})
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.float32, z_loss=0.0),
        compiler_options=FAST_COMPILE,
    )
    unlabeled = batch()
    unlabeled.labels[:] = -100
    updated, _, metrics = step(params, rule.init(params), unlabeled, None)
    assert (float(metrics.loss), int(metrics.num_tokens)) == (0.0, 0)
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (updated, params)), strict=True)
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("parameters", ["float32", "bfloat16", "float64"])
def test_dtypes_do_not_change(parameters: str, compute: str) -> None:
    with jax.enable_x64(parameters == "float64"):
        graphdef, params = params_of(jnp.dtype(parameters))
        rule = make_optimizer("adamw", 1e-2, **OPTIONS)
        opt_state = rule.init(params)
        step = jax.jit(
            make_step(graphdef, rule, compute_dtype=jnp.dtype(compute), z_loss=0.0),
            compiler_options=FAST_COMPILE,
        )
        one_batch = batch(micro=2, rows=2)
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, opt_state))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(parameters)}
        losses = []
        for _ in range(3):
            params, opt_state, metrics = step(params, opt_state, one_batch, None)
            losses.append(float(metrics.loss))
            after = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, opt_state))
            assert after == before
        loss, tokens = jax.jit(
            make_evaluation(graphdef, compute_dtype=jnp.dtype(compute)),
            compiler_options=FAST_COMPILE,
        )(params, one_batch)
        assert metrics.loss.dtype == loss.dtype == jnp.float32
        assert int(tokens) == int((one_batch.labels != -100).sum())
        assert losses[-1] < losses[0]
        assert abs(losses[0] - np.log(61)) < 0.1


def test_tokens_are_counted_exactly_with_bfloat16_parameters() -> None:
    """bfloat16 would make 297 tokens 296."""
    graphdef, params = params_of(jnp.bfloat16)
    rule = make_optimizer("sgd", 0.0, **OPTIONS)
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.bfloat16, z_loss=0.0),
        compiler_options=FAST_COMPILE,
    )
    large_batch = batch(rows=27, length=12)
    metrics = step(params, rule.init(params), large_batch, None)[2]
    evaluate = jax.jit(
        make_evaluation(graphdef, compute_dtype=jnp.bfloat16), compiler_options=FAST_COMPILE
    )
    loss, tokens = evaluate(params, large_batch)
    assert int(tokens) == int(metrics.num_tokens) == 297
    assert abs(float(metrics.loss) - float(loss) / 297) < 1e-5


def test_micro_batches_are_summed_in_float32() -> None:
    """64 equal micro-batches have the gradient of one; a bfloat16 sum would stop growing."""
    graphdef, params = params_of(jnp.bfloat16)
    # an optimizer whose state is the gradient
    rule = optax.GradientTransformationExtraArgs(
        lambda params: params, lambda gradients, state, params, **_: (gradients, gradients)
    )
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.bfloat16, z_loss=None),
        compiler_options=FAST_COMPILE,
    )
    one = batch(rows=1)
    many = jax.tree.map(partial(np.repeat, repeats=64, axis=0), one)
    _, expected, _ = step(params, params, one, None)
    _, actual, metrics = step(params, params, many, None)
    assert int(metrics.num_tokens) == 64 * 11
    for path, gradient in named(actual).items():
        assert gradient.dtype == jnp.bfloat16
        assert relative_error(gradient, named(expected)[path]) <= 2**-8, path
    # and the norm is that of the float64 sum
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in named(actual).values()))
    np.testing.assert_allclose(float(metrics.grad_norm), norm, rtol=1e-6)
