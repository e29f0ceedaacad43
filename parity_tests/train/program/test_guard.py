"""The guard, against its rule in numpy: which steps are left out or clipped, and what that leaves."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import LlamaConfig
from parity_tests.harness.child_process import ROOT
from parity_tests.train.program.optimizer_definitions import adamw
from parity_tests.train.program.test_optimizer import OPTIONS, batch, params_of
from parity_tests.train.runs import CONFIG
from train.options import AverageOptions, GuardOptions, ModelOptions, RunOptions
from train.program.build import run_program
from train.program.guard import GuardState, decision_of, guarded, value_names
from train.program.optimizer import make_optimizer
from train.program.step import make_step

WINDOW, STEPS = 5, 24
LARGEST = np.finfo(np.float64).max


def learning_rate(step: Any) -> Any:
    return 0.1 / (1 + step)


def tree(rng: np.random.Generator) -> dict[str, Any]:
    """Two layers, and parameters in none."""
    draw = rng.normal
    return {
        "layers": {"proj": draw(size=(2, 3, 4)), "norm": draw(size=(2, 4))},
        "embed": draw(size=(5, 4)),
        "norm": draw(size=4),
    }


def steps() -> list[tuple[float, dict[str, Any]]]:
    """Losses and gradients with a high loss, large gradients of all or of one layer, and NaN in two."""
    rng = np.random.default_rng(0)
    sequence = []
    for number in range(STEPS):
        loss, gradients = 3 + 0.1 * rng.normal(), tree(rng)
        if number == 9:
            loss = 5.0
        if number in (11, 12, 17):
            gradients = jax.tree.map(lambda leaf: 30 * leaf, gradients)
        if number == 14:
            gradients["layers"]["proj"][1] *= 50
        if number == 15:
            loss = np.nan
        if number == 16:
            gradients["embed"][0, 0] = np.inf
        sequence.append((loss, gradients))
    return sequence


class Reference:
    """The rule in numpy, with AdamW by its paper; layers are separate parameters."""

    def __init__(self, options: GuardOptions, params: dict[str, Any]) -> None:
        self.options = options
        self.params = self.split(params)
        self.states: dict[str, Any] = {name: {} for name in self.params}
        self.window: list[np.ndarray] = []
        self.updates = self.in_a_row = 0

    @staticmethod
    def split(values: dict[str, Any]) -> dict[str, np.ndarray]:
        layers = values["layers"]
        each = {f"{name}{n}": layers[name][n] for n in range(2) for name in layers}
        return each | {"embed": values["embed"], "norm_of_no_layer": values["norm"]}

    def groups(self) -> list[list[str]]:
        if self.options.action != "clip-layers":
            return [list(self.params)]
        return [["proj0", "norm0"], ["proj1", "norm1"], ["embed"], ["norm_of_no_layer"]]

    def step(self, number: int, loss: float, gradients: dict[str, Any]) -> tuple[Any, Any, int]:
        options, parts = self.options, self.split(gradients)
        groups = self.groups()
        norms = [np.sqrt(sum(np.square(parts[name]).sum() for name in group)) for group in groups]
        values = np.array([loss, *norms])
        bound = np.full(len(values), LARGEST)
        last = np.array(self.window[-options.window :])
        if len(last) == options.window and options.action is not None:
            sigmas = [options.loss_sigma if options.action == "skip" else None]
            sigmas += [options.norm_sigma] * len(norms)
            for n, sigma in enumerate(sigmas):
                if sigma is not None:
                    bound[n] = last[:, n].mean() + sigma * np.std(last[:, n], ddof=1)
        finite = bool(np.isfinite(values).all())
        outlier = (values > bound) & finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        skip = (not finite) or (options.action == "skip" and outlier.any())
        if finite:
            self.window.append(np.minimum(values, bound))
        if not skip:
            if options.action in ("clip", "clip-layers"):
                for group, norm, limit in zip(groups, norms, bound[1:], strict=True):
                    for name in group:
                        parts[name] = parts[name] * (limit / norm if norm > limit else 1)
            self.update(number, parts)
        return bound, outlier, self.in_a_row

    def update(self, number: int, gradients: dict[str, np.ndarray]) -> None:
        self.updates += 1
        options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        for name, value in self.params.items():
            direction = adamw(self.states[name], gradients[name], value, self.updates, options)
            decay = 0 if "norm" in name else 0.1
            # the learning rate is that of the run's step, whatever was left out
            self.params[name] = value - learning_rate(number) * (direction + decay * value)


@pytest.mark.parametrize("action", ["skip", "clip", "clip-layers", None])
def test_the_guard_is_its_rule_in_numpy(action: Any) -> None:
    options = GuardOptions(
        action=action, window=WINDOW, loss_sigma=4.0, norm_sigma=3.0, non_finite=2
    )
    params = tree(np.random.default_rng(1))
    reference = Reference(options, params)
    seen = []
    with jax.enable_x64(True):
        inner = make_optimizer("adamw", learning_rate, **OPTIONS | {"clip_norm": None})
        rule = guarded(inner, options)
        actual = jax.tree.map(jnp.asarray, params)
        state = rule.init(actual)

        @jax.jit
        def step(params: Any, state: Any, gradients: Any, loss: Any) -> Any:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = rule.update(gradients, state, params, loss=loss)
                return optax.apply_updates(params, updates), state

        for number, (loss, gradients) in enumerate(steps()):
            actual, state = step(actual, state, gradients, jnp.float64(loss))
            bound, outlier, in_a_row = reference.step(number, loss, gradients)
            np.testing.assert_allclose(state.decision.bound, bound, rtol=1e-9)
            assert np.array_equal(state.decision.outlier, outlier), number
            assert int(state.decision.non_finite) == in_a_row
            seen.append((bool(outlier.any()), in_a_row))
        for name, value in reference.params.items():
            np.testing.assert_allclose(reference.split(actual)[name], value, rtol=1e-9, atol=1e-12)
    expected = {"skip": {9, 11, 12, 14, 17}, "clip": {11, 12, 14, 17}}.get(action, set())
    if action == "clip-layers":
        expected = {11, 12, 14, 17}
    assert {n for n, (outlier, _) in enumerate(seen) if outlier} >= expected
    assert [in_a_row for _, in_a_row in seen[14:18]] == [0, 1, 2, 0]


def test_a_step_that_is_left_out_leaves_every_bit() -> None:
    """Also that of -0.0, which adding 0.0 would change."""
    rule = guarded(make_optimizer("adamw", 0.1, **OPTIONS), GuardOptions(non_finite=1))
    params = {"layers": {"w": jnp.array([[-0.0, 0.0, 1.5, -2.0]])}, "norm": jnp.ones(2)}
    state: Any = rule.init(params)
    gradients = {"layers": {"w": jnp.array([[jnp.nan, 1.0, 1.0, 1.0]])}, "norm": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):
        updates, after = jax.jit(rule.update)(gradients, state, params, loss=jnp.float32(1))
        moved = jax.jit(optax.apply_updates)(params, updates)
    before = np.asarray(params["layers"]["w"])
    assert np.asarray(moved["layers"]["w"]).tobytes() == before.tobytes()
    assert int(after.decision.non_finite) == 1
    pairs = zip(jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_equal_values_are_never_outliers() -> None:
    """A mean that is rounded would be below some of them."""
    rule = guarded(optax.with_extra_args_support(optax.sgd(0.0)), GuardOptions("skip", window=7))
    params = {"w": jnp.full(3, 0.1)}
    state: Any = rule.init(params)
    update = jax.jit(rule.update)
    for _ in range(20):
        _, state = update(params, state, params, loss=jnp.float32(0.1))
        assert not np.any(state.decision.outlier)
    assert np.all(np.asarray(state.decision.bound) < 1)


def test_a_lasting_change_is_accepted_in_time() -> None:
    rule = guarded(optax.with_extra_args_support(optax.sgd(0.0)), GuardOptions("skip", window=8))
    params, rng = {"w": jnp.ones(3)}, np.random.default_rng(0)
    state: Any = rule.init(params)
    skipped, update = [], jax.jit(rule.update)
    for step in range(60):
        loss = (1.0 if step < 20 else 9.0) + 0.01 * rng.normal()
        _, state = update(params, state, params, loss=jnp.float32(loss))
        skipped.append(bool(np.any(state.decision.outlier)))
    assert not any(skipped[:20])
    assert all(skipped[20:22])
    assert not any(skipped[40:])


def test_the_norm_of_the_update_is_a_value_of_its_own() -> None:
    """sgd's update is the learning rate times the gradient: a jump of the rate shows in it alone."""
    options = GuardOptions("skip", window=4, loss_sigma=None, norm_sigma=None, update_sigma=3.0)
    rate = optax.piecewise_constant_schedule(0.1, {6: 50.0, 7: 0.02})
    rule = guarded(optax.with_extra_args_support(optax.sgd(rate)), options)
    params, rng = {"w": jnp.ones(3)}, np.random.default_rng(0)
    assert value_names(params, options) == ["loss", "gradient norm", "update norm"]
    state: Any = rule.init(params)
    skipped, update = [], jax.jit(rule.update)
    for _ in range(10):
        gradient = {"w": jnp.asarray(rng.normal(1, 0.1, 3), jnp.float32)}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(gradient, state, params, loss=jnp.float32(1))
        skipped.append(not np.any(updates["w"]))
    assert skipped == [number == 6 for number in range(10)]


def program_of(**changes: Any) -> Any:
    options = RunOptions(
        batch_size=4,
        sequence_length=16,
        micro_batches=2,
        model=ModelOptions(compute_dtype="float32"),
    )
    return run_program(
        dataclasses.replace(options, **changes), LlamaConfig.from_dict(CONFIG), jax.devices()[:1]
    )


def test_without_guard_and_average_the_program_is_the_same() -> None:
    """As one whose optimizer is told nothing of the loss."""
    program = program_of()
    bare = optax.GradientTransformationExtraArgs(
        program.optimizer.init,
        lambda gradients, state, params, loss: program.optimizer.update(gradients, state, params),
    )
    step = make_step(
        program.graphdef,
        bare,
        compute_dtype=jnp.dtype("float32"),
        z_loss=0.0,
        remat="dots",
        scan_unroll=1,
        attention_implementation=None,
        pipeline=None,
    )

    def text(function: Any, program: Any) -> str:
        with jax.set_mesh(program.mesh):
            arguments = program.params, program.opt_state, program.batch, None
            return str(jax.jit(function).lower(*arguments).as_text())

    plain = text(program.step.__wrapped__, program)
    assert plain == text(step, program)
    for changes in (
        {"guard": GuardOptions("skip")},
        {"guard": GuardOptions(non_finite=1)},
        {"average": AverageOptions(0.9)},
    ):
        other = program_of(**changes)
        assert text(other.step.__wrapped__, other) != plain


def test_a_step_reports_its_guard() -> None:
    graphdef, params = params_of()
    options = GuardOptions("clip-layers")
    rule = guarded(make_optimizer("adamw", 1e-2, **OPTIONS), options)
    names = value_names(params, options)
    assert names[:3] == ["loss", "gradient norm of layer 0", "gradient norm of layer 1"]
    assert names[-1] == "gradient norm of model.norm.weight"
    step = make_step(graphdef, rule, compute_dtype=jnp.float32, z_loss=0.0)
    opt_state = jax.eval_shape(rule.init, params)
    _, state, metrics = jax.eval_shape(step, params, opt_state, batch(), None)
    assert isinstance(state, GuardState)
    assert metrics.guard.bound.shape == (len(names),)
    assert decision_of(()) is None


@pytest.mark.slow
def test_decisions_over_a_mesh() -> None:
    """fsdp 4 x tensor 2 and micro-batches decide as one device does, and update alike."""
    command = [sys.executable, "-m", "parity_tests.train.program.sharded_guard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        action, decided, error, skipped = line.split()
        print(line)
        assert decided == "same"
        assert float(error) < 2e-5
        assert int(skipped) >= 2, action
