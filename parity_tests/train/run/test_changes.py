"""Runs that may be given another number of steps: their steps so far would have been the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from train.options import OptimizerOptions, RunOptions
from train.run.changes import rejected_steps


def options(schedule: Any, steps: int) -> RunOptions:
    return RunOptions(
        steps=steps,
        optimizer=OptimizerOptions(schedule=schedule, warmup_steps=10, decay_fraction=0.2),
    )


@pytest.mark.parametrize(
    ("schedule", "last"),
    # the last step after which steps can be added: all but wsd until the step after the warmup
    [("constant", 100), ("wsd", 81), ("cosine", 11), ("linear", 11)],
)
def test_steps_can_be_added_before_the_learning_rate_falls(schedule: str, last: int) -> None:
    saved, more = options(schedule, 100), options(schedule, 150)
    assert rejected_steps(saved, saved, 100) == []
    for done in (0, last):
        assert rejected_steps(saved, more, done) == []
    for done in {min(last + 1, 100), 100} - {last}:
        (message,) = rejected_steps(saved, more, done)
        assert message.startswith("steps: found 150, expected 100: ")
        assert f"the {schedule} schedule has already lowered the learning rate" in message


def test_fewer_steps(tmp_path: Any) -> None:
    saved = options("constant", 100)
    assert rejected_steps(saved, replace(saved, steps=40), 40) == []
    (message,) = rejected_steps(saved, replace(saved, steps=39), 40)
    assert (
        message == "steps: found 39, expected 100, or any number from 40, the steps that are done"
    )
    # before its decay has begun, wsd may also decay earlier than planned
    saved = options("wsd", 100)
    assert rejected_steps(saved, replace(saved, steps=50), 40) == []
    assert len(rejected_steps(saved, replace(saved, steps=50), 45)) == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_an_old_run_that_would_have_ended_within_its_warmup(schedule: str) -> None:
    """An earlier version began such runs; their steps are those of a longer run."""
    assert rejected_steps(options(schedule, 6), options(schedule, 100), 6) == []
