"""Which options of a run may change when it is resumed."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from train.options import RunOptions, warmup_steps
from train.program.schedules import learning_rate_schedule

# These change how, where and how long a run computes, not what.
FREE_ON_RESUME = (
    "out",
    "mesh",
    "distributed",
    "checkpoint",
    "evaluation",
    "log",
    "export_every",
    "deterministic",
    "steps",  # as far as `rejected_steps` allows
    "model.remat",
    "model.remat_save",
    "model.remat_offload",
    "model.scan_unroll",
    "model.attention",
    "optimizer.offload",
)


def rejected_changes(saved: RunOptions, options: RunOptions, done: int) -> list[str]:
    """Changes that a resumed run must not make, each as "NAME: found NEW, expected OLD".

    Args:
        done: steps that are done.
    """
    return fixed_options_changed(saved, options) + rejected_steps(saved, options, done)


def fixed_options_changed(saved: RunOptions, options: RunOptions) -> list[str]:
    """Changes of options that are not in `FREE_ON_RESUME`."""
    changes: list[str] = []

    def compare(prefix: str, before: Any, after: Any) -> None:
        for field in dataclasses.fields(before):
            name = prefix + field.name
            if name in FREE_ON_RESUME:
                continue
            old, new = getattr(before, field.name), getattr(after, field.name)
            if dataclasses.is_dataclass(old):
                compare(name + ".", old, new)
            elif old != new:
                changes.append(f"{name.replace('_', '-')}: found {new}, expected {old}")

    compare("", saved, options)
    return changes


def rejected_steps(saved: RunOptions, options: RunOptions, done: int) -> list[str]:
    """Why the run cannot have `options.steps` steps; empty if it can.

    It can if no step that is done would have had another learning rate: always with a constant schedule,
    with wsd before its decay begins, with cosine and linear during the warmup.
    """
    if options.steps == saved.steps:
        return []
    change = f"steps: found {options.steps}, expected {saved.steps}"
    if options.steps < done:
        return [f"{change}, or any number from {done}, the steps that are done"]
    if _same_constant(saved, options):  # known without computing any
        return []
    if np.array_equal(_learning_rates(saved, done), _learning_rates(options, done)):
        return []
    return [
        f"{change}: the {saved.optimizer.schedule} schedule has already lowered the learning rate towards "
        f"step {saved.steps}; steps can be added with a constant schedule, or with wsd before its decay: "
        "begin a new run from an export, --model.init-from"
    ]


def _same_constant(saved: RunOptions, options: RunOptions) -> bool:
    """Whether both have the same constant schedule; only its warmup can depend on the steps."""
    warmups = {warmup_steps(of.optimizer, of.steps) for of in (saved, options)}
    is_constant = saved.optimizer.schedule == "constant"
    return is_constant and saved.optimizer == options.optimizer and len(warmups) == 1


def _learning_rates(options: RunOptions, done: int) -> np.ndarray:
    """The learning rate of each step that is done."""
    optimizer, steps = options.optimizer, options.steps
    warmup = warmup_steps(optimizer, steps)
    if optimizer.schedule in ("cosine", "linear"):
        # an earlier version let a run end within its warmup, which does not depend on the steps
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
