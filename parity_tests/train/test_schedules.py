"""Schedules against their formulas and transformers' own."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from train.schedules import Schedule, learning_rate_schedule

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
    left = max(steps - warmup, 1)
    if name == "constant":
        return 1.0
    if name == "wsd":
        falling = max(round(steps * decay), 1)
        begin = max(steps - falling, warmup)
        return 1 - (1 - final) * min(max(step - begin, 0) / falling, 1)
    done = (step - warmup) / left
    if name == "linear":
        return 1 - (1 - final) * done
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup", "final", "decay"),
    [(40, 10, 0.1, 0.2), (40, 0, 0.0, 0.5), (40, 1, 1.0, 0.0), (5, 9, 0.1, 0.2), (10, 8, 0.1, 0.9)],
)
def test_formulas(name: Schedule, steps: int, warmup: int, final: float, decay: float) -> None:
    want = [PEAK * formula(name, step, steps, warmup, final, decay) for step in range(steps)]
    np.testing.assert_allclose(rates(name, steps, warmup, final, decay), want, rtol=1e-12)


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
def test_after_the_warmup_it_is_transformers(name: Schedule, theirs: str, options: dict) -> None:
    """Its warmup begins with a step of rate 0; ours does not."""
    steps, warmup = 40, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    counts = {"num_training_steps": steps} if name != "constant" else {}
    make = getattr(transformers.optimization, f"get_{theirs}")
    schedule = make(optimizer, num_warmup_steps=warmup, **counts, **options)
    want = []
    for _ in range(steps):
        want.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = rates(name, steps, warmup, 0.0 if name == "linear" else 0.1)
    np.testing.assert_allclose(ours[warmup:], want[warmup:], rtol=1e-12)
    if name != "wsd":  # whose warmup begins at the final rate there
        np.testing.assert_allclose(ours[: warmup - 1], want[1:warmup], rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    steps=st.integers(1, 30),
    warmup=st.integers(0, 40),
    final=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_between_final_and_peak(
    name: Schedule, steps: int, warmup: int, final: float, decay: float
) -> None:
    rate = learning_rate_schedule(
        name,
        peak=PEAK,
        steps=steps,
        warmup_steps=warmup,
        final_fraction=final,
        decay_fraction=decay,
    )
    lowest = PEAK * min(final, 1 / max(warmup, 1))
    for step in {0, steps // 2, steps - 1, steps, min(warmup, steps)}:
        assert lowest * (1 - 1e-5) - 1e-30 <= float(rate(step)) <= PEAK * (1 + 1e-6)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError) as caught:
        rates("square", 10, 1, 0.1)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "schedule: found 'square', expected cosine, linear, wsd or constant"
    )
