"""The reporter: steps are reported once, after the next is dispatched; requests to stop are remembered."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.presets import PRESETS
from train.monitoring.reporter import Reporter
from train.options import GuardOptions, LogOptions, ModelOptions, RunOptions
from train.program.guard import Decision
from train.program.step import Metrics

OPTIONS = RunOptions(
    steps=9,
    batch_size=2,
    sequence_length=4,
    model=ModelOptions(compute_dtype="float32"),
    log=LogOptions(peak_flops=1e12),
)
GO, STOP = jnp.asarray(False), jnp.asarray(True)


class Pending:
    """A loss that is not computed yet; reading it waits, so that it can be read all the same."""

    def __init__(self, value: float, ready: bool) -> None:
        self.value, self.ready = np.float32(value), ready

    def is_ready(self) -> bool:
        return self.ready

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        return np.asarray(self.value)


def metrics(loss: float, *, ready: bool = False, grad_norm: float = 1.0) -> Metrics:
    return Metrics(Pending(loss, ready), np.float32(0), np.float32(grad_norm), np.int32(8))  # type: ignore[arg-type]


@pytest.fixture
def recorded() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def reporter(recorded: list[dict[str, Any]]) -> Reporter:
    program: Any = SimpleNamespace(
        config=PRESETS["tiny-4m"], learning_rate=lambda step: jnp.asarray(0.5 * step)
    )
    display: Any = SimpleNamespace(step=lambda line, steps: None)
    return Reporter(program, OPTIONS, display, recorded.append)


def steps(recorded: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in recorded]


def test_a_step_is_reported_when_the_next_is_submitted(reporter, recorded) -> None:
    reporter.flush()
    reporter.submit(1, metrics(3.0), GO, 0.25)
    assert recorded == []
    reporter.submit(2, metrics(2.0), GO, 0.0)
    assert steps(recorded) == [1]
    reporter.flush()
    reporter.flush()
    assert steps(recorded) == [1, 2]
    first = recorded[0]
    assert (first["loss"], first["num_tokens"], first["data_wait"]) == (3.0, 8, 0.25)
    assert first["learning_rate"] == 0.0  # schedules count from 0
    assert first["tokens_per_second"] == pytest.approx(8 / first["seconds"])


def test_poll_reports_only_what_is_ready(reporter, recorded) -> None:
    reporter.poll()
    reporter.submit(1, metrics(3.0, ready=False), GO, 0.0)
    reporter.poll()
    assert recorded == []
    reporter.submit(2, metrics(3.0, ready=True), GO, 0.0)
    reporter.poll()
    assert steps(recorded) == [1, 2]


def test_a_request_to_stop_is_remembered(reporter) -> None:
    reporter.submit(1, metrics(3.0), STOP, 0.0)
    assert not reporter.stopping
    reporter.submit(2, metrics(3.0), GO, 0.0)
    assert reporter.stopping
    reporter.flush()
    assert reporter.stopping


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (np.inf, 1.0), (3.0, np.nan)])
def test_a_loss_or_norm_that_is_not_finite(reporter, recorded, loss: float, norm: float) -> None:
    reporter.submit(1, metrics(loss, grad_norm=norm), GO, 0.0)
    with pytest.raises(ValueError, match=r"step 1: found loss .*, expected finite numbers"):
        reporter.flush()
    assert recorded == []


def guarded(in_a_row: int, *, outlier: int = 0, loss: float = 3.0) -> Metrics:
    bound = np.array([2.5, 9.0], np.float32)
    decision = Decision(bound, np.array([outlier, 0]), np.int32(in_a_row))  # type: ignore[arg-type]
    return metrics(loss)._replace(guard=decision)


def test_steps_that_a_guard_left_out(recorded) -> None:
    """Two in a row that are not finite are reported; a third ends the run."""
    said: list[str] = []
    program: Any = SimpleNamespace(
        config=PRESETS["tiny-4m"], learning_rate=lambda step: jnp.asarray(0.1), params={}
    )
    display: Any = SimpleNamespace(step=lambda line, steps: None, say=said.append)
    options = dataclasses.replace(OPTIONS, guard=GuardOptions("skip", non_finite=2))
    rows = [{"source": "tokens", "window": 7}]
    reporter = Reporter(program, options, display, recorded.append, lambda step: rows)
    reporter.submit(1, guarded(0, outlier=1), GO, 0.0)
    reporter.submit(2, guarded(1, loss=np.nan), GO, 0.0)
    reporter.submit(3, guarded(2, loss=np.inf), GO, 0.0)
    reporter.submit(4, guarded(3, loss=np.nan), GO, 0.0)
    with pytest.raises(
        ValueError, match=r"step 4: found loss nan .*, 3 such steps in a row, expected"
    ):
        reporter.flush()
    assert [line["loss"] for line in recorded if "loss" in line] == [3.0, None, None]
    events = [line for line in recorded if "event" in line]
    assert events == [
        {"step": 1, "event": "skipped", "reason": ["loss above 2.5"], "batch": rows},
        {"step": 2, "event": "skipped", "reason": ["not finite"], "batch": rows},
        {"step": 3, "event": "skipped", "reason": ["not finite"], "batch": rows},
    ]
    assert said[0] == (
        "step 1: skipped: loss above 2.5 (loss 3, gradient norm 1); its rows are tokens window 7"
    )
    json.loads(json.dumps(recorded, allow_nan=False))


def test_a_guard_that_leaves_out_none_that_is_not_finite(recorded) -> None:
    program: Any = SimpleNamespace(config=PRESETS["tiny-4m"], learning_rate=jnp.asarray)
    options = dataclasses.replace(OPTIONS, guard=GuardOptions("clip"))
    reporter = Reporter(program, options, SimpleNamespace(), recorded.append)  # type: ignore[arg-type]
    reporter.submit(1, guarded(1, loss=np.nan), GO, 0.0)
    with pytest.raises(ValueError, match=r"step 1: found loss nan and gradient norm 1.0, expected"):
        reporter.flush()
    assert recorded == []
