"""The step: micro-batches are the whole batch, and dtypes are what was asked for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parity_tests.harness.programs import FAST_COMPILE
from parity_tests.reference.errors import relative_error
from parity_tests.train.program.test_optimizer import OPTIONS, batch, named, params_of
from train.data.batch import Batch
from train.program.optimizer import make_optimizer
from train.program.step import make_evaluation, make_step


def test_accumulation_is_the_full_batch() -> None:
    """With labels ignored in some rows only, so that a mean of means would be wrong."""
    with jax.enable_x64(True):
        graphdef, params = params_of(jnp.float64)
        rule = make_optimizer("adamw", 1e-2, **OPTIONS)
        step = jax.jit(
            make_step(graphdef, rule, compute_dtype=jnp.float64, z_loss=0.01),
            compiler_options=FAST_COMPILE,
        )
        given = batch(rows=4)
        given.labels[0, :2, 3:] = -100
        results = []
        for micro in (1, 2, 4):
            parts = Batch(*(each.reshape(micro, 4 // micro, -1) for each in given))
            moved, state, metrics = step(params, rule.init(params), parts, None)
            results.append(jax.tree.leaves((moved, state, metrics)))
        assert int(results[0][-1]) == int((given.labels != -100).sum())
        for other in results[1:]:
            worst = max(relative_error(a, b) for a, b in zip(other, results[0], strict=True))
            print(f"accumulation: {worst:.1e}")
            assert worst <= 1e-12


def test_a_batch_without_labels_moves_nothing_but_by_decay() -> None:
    graphdef, params = params_of()
    rule = make_optimizer("sgd", 1e-2, **OPTIONS | {"weight_decay": 0.0})
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.float32, z_loss=0.0),
        compiler_options=FAST_COMPILE,
    )
    given = batch()
    given.labels[:] = -100
    moved, _, metrics = step(params, rule.init(params), given, None)
    assert (float(metrics.loss), int(metrics.num_tokens)) == (0.0, 0)
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True)
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("parameters", ["float32", "bfloat16", "float64"])
def test_dtypes_stay(parameters: str, compute: str) -> None:
    with jax.enable_x64(parameters == "float64"):
        graphdef, params = params_of(jnp.dtype(parameters))
        rule = make_optimizer("adamw", 1e-2, **OPTIONS)
        opt_state = rule.init(params)
        step = jax.jit(
            make_step(graphdef, rule, compute_dtype=jnp.dtype(compute), z_loss=0.0),
            compiler_options=FAST_COMPILE,
        )
        given = batch(micro=2, rows=2)
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, opt_state))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(parameters)}
        found = []
        for _ in range(3):
            params, opt_state, metrics = step(params, opt_state, given, None)
            found.append(float(metrics.loss))
            after = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, opt_state))
            assert after == before
        loss, tokens = jax.jit(
            make_evaluation(graphdef, compute_dtype=jnp.dtype(compute)),
            compiler_options=FAST_COMPILE,
        )(params, given)
        assert metrics.loss.dtype == loss.dtype == jnp.float32
        assert int(tokens) == int((given.labels != -100).sum())
        assert found[-1] < found[0]
        assert abs(found[0] - np.log(61)) < 0.1


def test_tokens_are_counted_exactly_with_bfloat16_parameters() -> None:
    """bfloat16 would make 297 tokens 296."""
    graphdef, params = params_of(jnp.bfloat16)
    rule = make_optimizer("sgd", 0.0, **OPTIONS)
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.bfloat16, z_loss=0.0),
        compiler_options=FAST_COMPILE,
    )
    given = batch(rows=27, length=12)
    metrics = step(params, rule.init(params), given, None)[2]
    evaluate = jax.jit(
        make_evaluation(graphdef, compute_dtype=jnp.bfloat16), compiler_options=FAST_COMPILE
    )
    loss, tokens = evaluate(params, given)
    assert int(tokens) == int(metrics.num_tokens) == 297
    assert abs(float(metrics.loss) - float(loss) / 297) < 1e-5


def test_micro_batches_are_summed_in_float32() -> None:
    """The same micro-batch 64 times is one of it; a sum in bfloat16 would stop to grow."""
    graphdef, params = params_of(jnp.bfloat16)
    # its state is the gradient
    rule = optax.GradientTransformationExtraArgs(
        lambda params: params, lambda gradients, state, params: (gradients, gradients)
    )
    step = jax.jit(
        make_step(graphdef, rule, compute_dtype=jnp.bfloat16, z_loss=None),
        compiler_options=FAST_COMPILE,
    )
    one = batch(rows=1)
    many = Batch(*(np.repeat(each, 64, axis=0) for each in one))
    (_, want, _), (_, got, metrics) = (step(params, params, each, None) for each in (one, many))
    assert int(metrics.num_tokens) == 64 * 11
    for path, gradient in named(got).items():
        assert gradient.dtype == jnp.bfloat16
        assert relative_error(gradient, named(want)[path]) <= 2**-8, path
    # and the norm is that of the float64 sum
    norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in named(got).values()))
    np.testing.assert_allclose(float(metrics.grad_norm), norm, rtol=1e-6)
