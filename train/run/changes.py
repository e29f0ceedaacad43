"""Whether a run may have another number of steps than it was begun with."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from train.options import RunOptions, warmup_steps
from train.program.schedules import learning_rate_schedule

# What a resumed run may have otherwise: where and how it computes, not what.
FREE_ON_RESUME = (
    "out",
    "mesh",
    "distributed",
    "checkpoint",
    "evaluation",
    "log",
    "export_every",
    "steps",  # as far as `train.run.changes` allows
    "model.remat",
    "model.scan_unroll",
    "model.attention",
)


def differences(old: RunOptions, new: RunOptions) -> list[str]:
    """The fields that a resumed run must not change, and did: "name: found NEW, expected OLD"."""
    found: list[str] = []

    def compare(prefix: str, before: Any, after: Any) -> None:
        for item in dataclasses.fields(before):
            name = prefix + item.name
            if name in FREE_ON_RESUME:
                continue
            one, other = getattr(before, item.name), getattr(after, item.name)
            if dataclasses.is_dataclass(one):
                compare(name + ".", one, other)
            elif one != other:
                found.append(f"{name.replace('_', '-')}: found {other}, expected {one}")

    compare("", old, new)
    return found


def faults(saved: RunOptions, options: RunOptions, done: int) -> list[str]:
    """Why the run cannot be given `options.steps`: "steps: found NEW, expected OLD, ...", or nothing.

    It can where every step already done has the learning rate that it would have had with the new number:
    with a constant schedule always, with wsd before its decay, with any other during the warmup.

    Args:
        done: steps that are done.
    """
    if options.steps == saved.steps:
        return []
    found = f"steps: found {options.steps}, expected {saved.steps}"
    if options.steps < done:
        return [f"{found}, or another number from {done}, the steps that are done"]
    if _same_rates(saved, options, done):
        return []
    return [
        f"{found}: its {saved.optimizer.schedule} schedule has lowered the learning rate towards "
        f"{saved.steps}; steps can be added with a constant schedule, or with wsd before its decay: "
        "start a new run from an export, --model.init-from"
    ]


def _same_rates(saved: RunOptions, options: RunOptions, done: int) -> bool:
    before, after = (_rates(each, done) for each in (saved, options))
    return np.array_equal(before, after)


def _rates(options: RunOptions, done: int) -> np.ndarray:
    """The learning rate of each step that is done."""
    optimizer, steps = options.optimizer, options.steps
    warmup = warmup_steps(optimizer, steps)
    if optimizer.schedule in ("cosine", "linear"):
        # a run that an earlier version began may end within its warmup, which does not depend on its steps
        steps = max(steps, warmup + 1)
    schedule = learning_rate_schedule(
        optimizer.schedule,
        peak=optimizer.learning_rate,
        steps=steps,
        warmup_steps=warmup,
        final_fraction=optimizer.final_fraction,
        decay_fraction=optimizer.decay_fraction,
    )
    return np.asarray(schedule(jnp.arange(done)))
