"""What is unusual about a step as a whole: its loss, its gradient, its update."""

import math
from typing import NamedTuple

import numpy as np

from train.autopsy.history import History, Step
from train.autopsy.noise import Comparison, compare
from train.autopsy.replay import Replay


class Symptom(NamedTuple):
    """A value of the whole step. comparison: None if there are too few steps before it."""

    name: str
    step: int
    value: float
    comparison: Comparison | None

    @property
    def unusual(self) -> bool:
        """Whether it is far above what the steps before it lead to expect, or not finite."""
        if not math.isfinite(self.value):
            return True
        return self.comparison is not None and self.comparison.unusual


def symptoms_of(replay: Replay, history: History, step: int, length: int) -> list[Symptom]:
    """The loss, the gradient's norm and the size of the update of a replayed step.

    Loss and norm are compared with those of up to `length` steps before it in metrics.jsonl, or replayed
    where they are not recorded; updates, divided by the learning rate, with those of the replayed steps.
    Norms are compared as logarithms.
    """
    before = range(max(step - length, 1), step)
    by_step = {one.step: one for one in history.steps}
    now = by_step[step]

    def series(name: str) -> list[float]:
        values = []
        for number in before:
            line = replay.recorded.get(number)
            if line is not None and line[name] is not None:
                values.append(float(line[name]))
            elif number in by_step:
                values.append(float(getattr(by_step[number], name)))
        return values

    losses, norms = series("loss"), series("grad_norm")
    updates = {
        number: update_size(replay, one)
        for number, one in by_step.items()
        if number <= step and replay.rates[number - 1] > 0
    }
    logs = [_log(value) for number, value in updates.items() if number < step]
    size = updates.get(step, math.nan)
    loss_floor = 0.005 * float(np.median(losses)) if losses else 1.0
    return [
        Symptom("loss", step, now.loss, compare(now.loss, losses, floor=loss_floor, trend=True)),
        Symptom(
            "gradient norm",
            step,
            now.grad_norm,
            compare(_log(now.grad_norm), list(map(_log, norms)), floor=0.05, trend=True),
        ),
        Symptom(
            "update by learning rate", step, size, compare(_log(size), logs, floor=0.05, trend=True)
        ),
    ]


def update_size(replay: Replay, step: Step) -> float:
    """The norm of a step's update of all parameters, by its learning rate."""
    squares = sum(float(np.square(norms.update).sum()) for norms in step.statistics.norms.values())
    return math.sqrt(squares) / float(replay.rates[step.step - 1])


def _log(value: float) -> float:
    return math.log(value) if value > 0 and math.isfinite(value) else math.nan
