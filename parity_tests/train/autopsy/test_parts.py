"""The parts of an autopsy, each against a definition or another library."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.autopsy.layers import dead_halves
from train.autopsy.moments import adam_moments, largest_ratio, out_of_line
from train.autopsy.noise import compare
from train.autopsy.rates import jumps
from train.options import OptimizerOptions
from train.program.activation_statistics import ActivationStatistics
from train.program.schedules import learning_rate_schedule
from train.program.statistics import Norms, Statistics

NAME = "model.layers.mlp.up_proj.weight"


@pytest.mark.parametrize("tail", ["normal", "laplace"])
def test_values_of_one_distribution_are_usual(tail: str) -> None:
    """Of a thousand values, each beside 32 others, none is called unusual."""
    rng = np.random.default_rng(0)
    draws = getattr(rng, tail)(size=(1000, 33))
    compared = [compare(row[-1], row[:-1].tolist(), floor=1e-9) for row in draws]
    assert not any(one.unusual for one in compared if one is not None)
    assert sum(one is not None for one in compared) == 1000


def test_far_values_are_unusual_also_beside_a_trend() -> None:
    falling = [5 - 0.1 * step for step in range(20)]
    at, above = (compare(value, falling, floor=0.01, trend=True) for value in (3.0, 3.2))
    assert at is not None
    assert above is not None
    assert at.expected == pytest.approx(3.0)
    assert not at.unusual
    assert above.unusual
    nan = compare(float("nan"), falling, floor=0.01)
    assert nan is not None
    assert nan.unusual
    assert compare(1.0, falling[:7], floor=0.01) is None


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_no_schedule_jumps(schedule: Any, warmup: int) -> None:
    rate = learning_rate_schedule(
        schedule, peak=0.1, steps=40, warmup_steps=warmup, final_fraction=0.1, decay_fraction=0.3
    )
    with jax.numpy_dtype_promotion("standard"):
        rates = np.array(rate(jnp.arange(40)) + jnp.zeros(40))
    assert jumps(rates, 1, 40) == []
    rates[20:] *= 3
    assert [jump.step for jump in jumps(rates, 1, 40)] == [21]
    assert jumps(rates, 22, 40) == []


def adam_state(
    seed: int, scale: float = 1.0, steps: int = 30
) -> tuple[optax.ScaleByAdamState, list[dict[str, Any]]]:
    """Of two stacked layers, by optax, and the gradients' norms of five steps more."""
    options = OptimizerOptions()
    rule = optax.scale_by_adam(options.beta1, options.beta2, options.eps)
    rng = np.random.default_rng(seed)
    params = {
        "model": {
            "layers": {"mlp": {"up_proj": {"weight": jnp.zeros((2, 40, 30))}}},
            "embed": {"weight": jnp.zeros((50, 8))},
            "norm": {"weight": jnp.zeros(40)},
        }
    }

    def draw(leaf: Any) -> Any:
        # signs and sizes that change slowly, as in training, so that both moments count
        size = np.exp(rng.normal(size=leaf.shape) + rng.normal())
        return jnp.asarray(scale * size * rng.choice([-1, 1, 1], leaf.shape), jnp.float32)

    state = rule.init(params)
    update = jax.jit(rule.update)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            _, state = update(jax.tree.map(draw, params), state)
    norms = []
    for _ in range(5):
        gradients = jax.tree.map(draw, params)["model"]
        stacked = gradients["layers"]["mlp"]["up_proj"]["weight"]
        norms.append(
            {
                NAME: np.sqrt(np.square(stacked).sum((1, 2))),
                "model.embed.weight": np.linalg.norm(gradients["embed"]["weight"]),
                "model.norm.weight": np.linalg.norm(gradients["norm"]["weight"]),
            }
        )
    return state, norms


@pytest.mark.parametrize("seed", range(3))
def test_moments_of_a_history_are_possible(seed: int) -> None:
    state, after = adam_state(seed)
    moments = adam_moments((state,), OptimizerOptions())
    assert set(moments) == set(after[0])
    assert max(group.ratio.max() for group in moments.values()) <= 1.001
    assert out_of_line(moments, after, None, OptimizerOptions(), set()) == []


def test_the_bound_is_reached_by_the_worst_history() -> None:
    """Gradients of (beta1 / beta2)^k, k steps ago: the equality of Cauchy-Schwarz."""
    options = OptimizerOptions()
    rule = optax.scale_by_adam(options.beta1, options.beta2, options.eps)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        state = rule.init(jnp.zeros(1))
        for k in range(400, -1, -1):
            gradient = jnp.full(1, (options.beta1 / options.beta2) ** k)
            _, state = rule.update(gradient, state)
        ratio = float(state.mu[0] ** 2 / state.nu[0])
    assert ratio == pytest.approx(largest_ratio(options), rel=1e-6)
    assert largest_ratio(OptimizerOptions(beta1=0.99, beta2=0.9)) is None


@pytest.mark.parametrize(
    ("factor", "layer"), [(1e-3, 1), (0.0, 0), (1e5, 1)], ids=["small", "zero", "large"]
)
def test_a_changed_second_moment_is_named(factor: float, layer: int) -> None:
    state, after = adam_state(5)
    nu = state.nu
    weight = nu["model"]["layers"]["mlp"]["up_proj"]["weight"]
    nu["model"]["layers"]["mlp"]["up_proj"]["weight"] = weight.at[layer].multiply(factor)
    norms = [sum(np.square(v).sum() for v in step.values()) ** 0.5 for step in after] * 6
    moments = adam_moments((state._replace(nu=nu),), OptimizerOptions())
    findings = out_of_line(moments, after, norms, OptimizerOptions(), set())
    assert {(finding.name, finding.layer) for finding in findings} == {(NAME, layer)}


def statistics(gradients: list[float], dead: list[float]) -> Statistics:
    """Of an MLP in each layer whose three matrices have gradients of that norm."""
    values = np.array(gradients)
    norms = {
        f"model.layers.mlp.{name}_proj.weight": Norms(values, values, np.ones_like(values))
        for name in ("gate", "up", "down")
    }
    ones = np.ones(len(gradients))
    rest = dict.fromkeys(ActivationStatistics._fields, ones) | {"dead_units": np.array(dead)}
    return Statistics(norms, ActivationStatistics(**rest))  # type: ignore[arg-type]


def test_dead_layers() -> None:
    alive = statistics([1.0, 0.3, 0.5], [0.1, 0.0, 0.2])
    assert dead_halves([(1, alive), (2, alive)]) == []
    (dead,) = dead_halves([(1, alive), (2, statistics([1.0, 0.0, 0.5], [0.1, 0.0, 0.2]))])
    assert dead[:3] == (1, "MLP", 2)
    (dead,) = dead_halves([(3, statistics([1.0, 0.3, 0.5], [0.1, 1.0, 0.2]))])
    assert dead[:3] == (1, "MLP", 3)
    assert dead_halves([(1, statistics([0.1], [0.2]))]) == []
