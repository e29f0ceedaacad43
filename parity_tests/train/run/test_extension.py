"""Which runs can have more steps: those whose steps so far would have been the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from train.options import OptimizerOptions, RunOptions
from train.run.changes import faults


def options(schedule: Any, steps: int) -> RunOptions:
    return RunOptions(
        steps=steps,
        optimizer=OptimizerOptions(schedule=schedule, warmup_steps=10, decay_fraction=0.2),
    )


@pytest.mark.parametrize(
    ("schedule", "last"),
    # the last step that may be done: of any, as long as it warms up and a step after; of wsd, 80 of 100
    [("constant", 100), ("wsd", 81), ("cosine", 11), ("linear", 11)],
)
def test_the_steps_done_decide(schedule: str, last: int) -> None:
    saved, more = options(schedule, 100), options(schedule, 150)
    assert faults(saved, saved, 100) == []
    for done in (0, last):
        assert faults(saved, more, done) == []
    for done in {min(last + 1, 100), 100} - {last}:
        (fault,) = faults(saved, more, done)
        assert fault.startswith("steps: found 150, expected 100: ")
        assert f"its {schedule} schedule has lowered the learning rate" in fault


def test_fewer_steps(tmp_path: Any) -> None:
    saved = options("constant", 100)
    assert faults(saved, replace(saved, steps=40), 40) == []
    (fault,) = faults(saved, replace(saved, steps=39), 40)
    assert (
        fault == "steps: found 39, expected 100, or another number from 40, the steps that are done"
    )
    # wsd may begin its decay earlier than planned, while it has not begun
    saved = options("wsd", 100)
    assert faults(saved, replace(saved, steps=50), 40) == []
    assert len(faults(saved, replace(saved, steps=50), 45)) == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_that_would_have_ended_within_its_warmup(schedule: str) -> None:
    """Such a run cannot be begun any more, but its steps so far are those of a longer one."""
    assert faults(options(schedule, 6), options(schedule, 100), 6) == []
