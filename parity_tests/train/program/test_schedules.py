"""Schedules against their formulas and transformers' own."""

from __future__ import annotations

import math
import re
from typing import get_args

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from train.options import OptimizerOptions, Schedule, warmup_steps
from train.program.schedules import USES, learning_rate_schedule, require_fit

PEAK = 3e-3


def rates(name: Schedule, steps: int, warmup: int, final: float, decay: float = 0.2) -> np.ndarray:
    with jax.enable_x64(True):
        rate = learning_rate_schedule(
            name,
            peak=PEAK,
            steps=steps,
            warmup_steps=warmup,
            final_fraction=final,
            decay_fraction=decay,
        )
        return np.asarray([float(rate(step)) for step in range(steps)])


def formula(name: str, step: int, steps: int, warmup: int, final: float, decay: float) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    if name == "wsd":
        falling = max(round(steps * decay), 1)
        begin = steps - falling
        return 1 - (1 - final) * max(step - begin, 0) / falling
    done = (step - warmup) / (steps - warmup)
    if name == "linear":
        return 1 - (1 - final) * done
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup", "final", "decay"),
    [
        (40, 10, 0.1, 0.2),
        (40, 0, 0.0, 0.5),
        (40, 1, 1.0, 0.01),
        (10, 8, 0.1, 0.2),
        (1, 0, 0.1, 1.0),
    ],
)
def test_formulas(name: Schedule, steps: int, warmup: int, final: float, decay: float) -> None:
    expected = [PEAK * formula(name, step, steps, warmup, final, decay) for step in range(steps)]
    np.testing.assert_allclose(rates(name, steps, warmup, final, decay), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("cosine", "cosine_with_min_lr_schedule_with_warmup", {"min_lr_rate": 0.1}),
        ("linear", "linear_schedule_with_warmup", {}),
        (
            "wsd",
            "wsd_schedule",
            {"decay_type": "linear", "min_lr_ratio": 0.1, "num_decay_steps": 8},
        ),
        ("constant", "constant_schedule_with_warmup", {}),
    ],
)
def test_after_the_warmup_rates_are_those_of_transformers(
    name: Schedule, theirs: str, options: dict
) -> None:
    """In transformers the warmup begins with a step of rate 0."""
    steps, warmup = 40, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    counts = {"num_training_steps": steps} if name != "constant" else {}
    make = getattr(transformers.optimization, f"get_{theirs}")
    schedule = make(optimizer, num_warmup_steps=warmup, **counts, **options)
    expected = []
    for _ in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = rates(name, steps, warmup, 0.0 if name == "linear" else 0.1)
    np.testing.assert_allclose(ours[warmup:], expected[warmup:], rtol=1e-12)
    if name != "wsd":  # in transformers its warmup begins at the final rate
        np.testing.assert_allclose(ours[: warmup - 1], expected[1:warmup], rtol=1e-12)


NAMES = ["cosine", "linear", "wsd", "constant"]


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 30),
    warmup=st.integers(0, 30),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_rates_rise_to_the_peak_and_fall_to_the_final_rate(
    name: Schedule, steps: int, warmup: int, final: float, decay: float
) -> None:
    """Or the options are refused. The final rate is reached at `steps`, one after the last step."""
    falling = max(round(steps * decay), 1)
    fits = {"constant": warmup <= steps, "wsd": warmup + falling <= steps}.get(name, warmup < steps)
    options = {"steps": steps, "warmup_steps": warmup, "decay_fraction": decay}
    if not fits:
        with pytest.raises(ValueError, match=f"^optimizer.warmup-steps: found {warmup}"):
            require_fit(name, **options)
        return
    rate = learning_rate_schedule(name, peak=PEAK, final_fraction=final, **options)
    relative = np.asarray(jax.vmap(rate)(np.arange(steps + 1)), np.float64) / PEAK
    assert relative[0] > 0
    assert abs(relative[:steps].max() - 1) <= 1e-6
    peak = max(warmup - 1, 0)
    assert abs(relative[peak] - 1) <= 1e-6
    assert (np.diff(relative[: peak + 1]) >= -1e-6).all()
    assert (np.diff(relative[peak:]) <= 1e-6).all()
    end = 1.0 if name == "constant" else final
    assert abs(relative[steps] - end) <= 1e-6
    assert relative[steps - 1] >= end - 1e-6


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "decay", "message"),
    [
        (
            *("wsd", 100, 90, 0.2),
            "found 90, and a decay of 20 steps, expected at most 100 steps together: lower "
            "--optimizer.warmup-steps to 80, or --optimizer.decay-fraction to 0.1",
        ),
        ("wsd", 100, 100, 0.2, "found 100, expected at most 80 of 100 steps with the wsd schedule"),
        (
            "cosine",
            10,
            20,
            0.2,
            "found 20, expected at most 9 of 10 steps with the cosine schedule",
        ),
        (
            "linear",
            10,
            10,
            0.2,
            "found 10, expected at most 9 of 10 steps with the linear schedule",
        ),
        (
            "constant",
            5,
            6,
            0.2,
            "found 6, expected at most 5 of 5 steps with the constant schedule",
        ),
        ("cosine", 1, 1, 0.2, "found 1, expected at most 0 of 1 steps with the cosine schedule"),
    ],
)
def test_options_that_do_not_fit(
    name: Schedule, steps: int, warmup: int, decay: float, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        rates(name, steps, warmup, 0.1, decay)
    assert str(caught.value) == f"optimizer.warmup-steps: {message}"


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 150, 200, 300, 10_000])
def test_the_default_warmup_fits_every_run(steps: int) -> None:
    for name in NAMES:
        optimizer = OptimizerOptions(schedule=name)  # type: ignore[arg-type]
        warmup = warmup_steps(optimizer, steps)
        assert warmup == min(20, steps // 10)
        require_fit(name, steps=steps, warmup_steps=warmup, decay_fraction=0.2)  # type: ignore[arg-type]
    assert warmup_steps(OptimizerOptions(warmup_steps=7), steps) == 7


def test_which_options_a_schedule_uses() -> None:
    """An option is used if changing it changes a rate."""
    assert set(USES) == set(get_args(Schedule))
    for name in get_args(Schedule):
        first = rates(name, 20, 4, 0.1, 0.2)
        assert ("final_fraction" in USES[name]) == bool(
            (rates(name, 20, 4, 0.3, 0.2) != first).any()
        )
        assert ("decay_fraction" in USES[name]) == bool(
            (rates(name, 20, 4, 0.1, 0.5) != first).any()
        )


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError) as caught:
        rates("square", 10, 1, 0.1)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "schedule: found 'square', expected cosine, linear, wsd or constant"
    )


@pytest.mark.parametrize(
    ("steps", "warmup", "decay"),
    [(100, 90, 0.2), (12345, 1, 1.0), (12345, 4115, 1.0), (99999, 33333, 0.9), (3, 2, 1.0)],
)
def test_both_remedies_fit(steps: int, warmup: int, decay: float) -> None:
    options = {"steps": steps, "warmup_steps": warmup, "decay_fraction": decay}
    with pytest.raises(ValueError, match="steps together: lower") as refused:
        require_fit("wsd", **options)
    longest_warmup, fraction = re.findall(r" to ([0-9.]*[0-9])", str(refused.value))
    require_fit("wsd", **(options | {"warmup_steps": int(longest_warmup)}))
    require_fit("wsd", **(options | {"decay_fraction": float(fraction)}))
