"""Named arrays and their gradients, wherever a JAX program names them."""

import doctest
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from parity_tests.traces import named_arrays, names, precision
from parity_tests.traces import record_jax as recorder
from parity_tests.traces.named_arrays import Named, with_named_arrays
from parity_tests.traces.record_jax import record_jax, sown
from parity_tests.traces.trace import open_trace

LENGTH = 3
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(LENGTH, 4, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return checkpoint_name(2 * x, "doubled")


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))


def program(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Names within remat in a scan, within jit, within a custom derivative, and the same one twice."""

    @jax.checkpoint
    def body(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        x = checkpoint_name(jnp.tanh(x @ weight), "hidden")
        return checkpoint_name(x + 1, "end"), None

    x, _ = jax.lax.scan(body, x, weights, reverse=True)
    x = jax.jit(lambda x: checkpoint_name(jnp.sin(x), "inner"))(x)
    return jnp.sum(jnp.square(checkpoint_name(doubled(x), "end")))


def plain(weights: jax.Array, x: jax.Array, added: Named) -> tuple[jax.Array, Any]:
    """The same with what is added written out."""
    hidden: list[Any] = [None] * LENGTH
    ends: list[Any] = [None] * LENGTH
    for index in reversed(range(LENGTH)):
        hidden[index] = x = jnp.tanh(x @ weights[index]) + added["hidden"][index]
        ends[index] = x = x + 1 + added["end"][index]
    inner = jnp.sin(x) + added["inner"][0]
    twice = 2 * inner + added["doubled"][0]
    end = twice + added["end"][LENGTH]
    arrays = {"hidden": hidden, "end": [*ends, end], "inner": [inner], "doubled": [twice]}
    return jnp.sum(jnp.square(end)), arrays


def test_values_and_gradients() -> None:
    run = with_named_arrays(program)
    out, named = jax.jit(lambda *arguments: run(None, *arguments))(WEIGHTS, X)
    zeros = jax.tree.map(jnp.zeros_like, named)
    expected, arrays = plain(WEIGHTS, X, zeros)
    assert out == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), named, arrays)

    gradient = jax.grad(lambda w, added: run(added, w, X)[0], (0, 1))
    reference = jax.grad(lambda w, added: plain(w, X, added)[0], (0, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.jit(gradient)(WEIGHTS, zeros),
        reference(WEIGHTS, zeros),
    )


def test_names_where_nothing_can_be_recorded_are_left_out() -> None:
    def loop(x: jax.Array) -> jax.Array:
        def body(x: jax.Array) -> jax.Array:
            return checkpoint_name(x + 1, "in a loop")

        return jax.lax.while_loop(lambda x: x[0, 0] < 0, body, x)

    out, named = with_named_arrays(loop)(None, jnp.full((2, 2), -2.0))
    assert named == {}
    np.testing.assert_array_equal(out, jnp.zeros((2, 2)))


def test_a_name_both_where_it_is_recorded_and_where_it_is_left_out() -> None:
    """In a scan in a scan and in a while loop; and of an array of integers."""

    def scanned(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        def inner(x: jax.Array, one: jax.Array) -> tuple[jax.Array, None]:
            return checkpoint_name(checkpoint_name(x + one, "x"), "loop"), None

        x, _ = jax.lax.scan(inner, x, jnp.ones(2))
        x = jax.lax.cond(x[0, 0] < 0, lambda x: checkpoint_name(-x, "x"), lambda x: x, x)
        x = checkpoint_name(x @ weight, "loop")
        return checkpoint_name(jax.lax.scan(inner, x, jnp.ones(3))[0], "loop"), None

    def program(x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(scanned, x, WEIGHTS)
        count = checkpoint_name(jnp.int32(2), "x")
        return jnp.sum(jnp.square(checkpoint_name(count.astype(x.dtype) * x, "x")))

    run = with_named_arrays(program)
    out, named = run(None, X)
    assert {name: len(arrays) for name, arrays in named.items()} == {"loop": 2 * LENGTH, "x": 1}
    assert out == pytest.approx(float(jnp.sum(jnp.square(named["x"][0]))), rel=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, named)
    gradient = jax.grad(lambda added: run(added, X)[0])(zeros)
    np.testing.assert_allclose(gradient["x"][0], 2 * named["x"][0], rtol=1e-6)
    for at in (LENGTH - 1, 2 * LENGTH - 1):  # of the last iteration
        np.testing.assert_allclose(gradient["loop"][at], 4 * named["x"][0], rtol=1e-6)
        np.testing.assert_allclose(
            named["loop"][at] + 3 * (at < LENGTH), named["x"][0] / 2, rtol=1e-6
        )


class Scaled(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.arange(3.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x * self.weight[...]
        self.sow(nnx.Intermediate, "y", y)
        return jnp.sum(y)


def test_what_modules_sow(tmp_path: Path) -> None:
    def loss(model: Scaled) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, state = nnx.capture(model, nnx.Intermediate)(jnp.full(3, 2.0))
        return value, sown(state)

    trace = record_jax(
        loss,
        Scaled(),
        tmp_path / "trace",
        inputs={"input_ids": np.zeros((1, 3), np.int32)},
        names={"y": "model.norm.output"},
        weights=lambda model: {"model.norm.weight": model.weight[...]},
    )
    opened = open_trace(trace)
    np.testing.assert_array_equal(opened.read("model.norm.output"), [0.0, 2.0, 4.0])
    np.testing.assert_array_equal(opened.read("model.norm.weight.grad"), [2.0, 2.0, 2.0])
    assert opened.read("loss") == 6


@pytest.mark.parametrize("module", [named_arrays, names, precision, recorder])
def test_examples_in_docstrings(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
