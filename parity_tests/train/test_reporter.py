"""The reporter: steps are reported once, after the next is dispatched; requests to stop are remembered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.presets import PRESETS
from train.monitoring.reporter import Reporter
from train.options import LogOptions, ModelOptions, RunOptions
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
