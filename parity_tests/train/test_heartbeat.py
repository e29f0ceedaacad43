"""heartbeat.json, by the rule that its documentation gives to supervisors."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from train.monitoring import heartbeat
from train.monitoring.heartbeat import FILE, open_heartbeat


def read(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / FILE).read_text())
    return content


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.time, "time", lambda: now[0])
    return now


def test_a_run_of_slow_steps(tmp_path: Path, clock: list[float]) -> None:
    """After a step of 100 s, the next may take 60 + 3 x 100."""
    with open_heartbeat(tmp_path) as beat:
        beat("starting", 0)
        assert read(tmp_path) | {"host": ""} == {
            "phase": "starting",
            "step": 0,
            "time": 1000.0,
            "expected_by": 2800.0,
            "pid": os.getpid(),
            "host": "",
        }
        beat("training", 0)
        clock[0] += 100
        beat("training", 1)
        assert read(tmp_path)["expected_by"] == clock[0] + 360
        clock[0] += 0.5
        beat("training", 2)  # too soon to write
        assert read(tmp_path)["step"] == 1
        beat("evaluating", 2)
        assert read(tmp_path)["expected_by"] == clock[0] + 1800
        beat("done", 2)
    assert read(tmp_path)["phase"] == "done"
    assert read(tmp_path)["expected_by"] is None


@pytest.mark.parametrize(("error", "phase"), [(KeyError, "failed"), (KeyboardInterrupt, "stopped")])
def test_a_run_that_fails(error: type[BaseException], phase: str, tmp_path: Path) -> None:
    def fail() -> None:
        with open_heartbeat(tmp_path) as beat:
            beat("training", 7)
            raise error

    with pytest.raises(error):
        fail()
    assert read(tmp_path)["phase"] == phase
    assert read(tmp_path)["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """As on a full disk: the run goes on."""
    with open_heartbeat(tmp_path / "gone") as beat:
        beat("training", 1)


def test_it_is_cheap(tmp_path: Path) -> None:
    """A thousand calls in a row write once."""
    with open_heartbeat(tmp_path) as beat:
        beat("training", 0)
        before = (tmp_path / FILE).stat().st_ino
        begun = time.monotonic()
        for step in range(1000):
            beat("training", step)
        if time.monotonic() - begun < 1:
            assert (tmp_path / FILE).stat().st_ino == before
