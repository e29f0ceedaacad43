"""Runs that are killed or stopped at any moment, and resumed, end like an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from parity_tests.train.runs import (
    Tiny,
    environment,
    finish,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    start,
    state_of,
)
from train.checkpoints import FOLDER
from train.monitoring.heartbeat import FILE as HEARTBEAT
from train.monitoring.metrics_log import FILE as METRICS
from train.options import FILE
from train.run.stop import RESUME

STEPS = 60
# saves and evaluations take longer than steps, so most kills hit those
OPTIONS = {"steps": STEPS, "checkpoint__every": 4, "evaluation__every": 6}
DEVICES = 8
MESHES = {
    "tensor": {"mesh__fsdp": 4, "mesh__tensor": 2},
    "stages": {"mesh__stage": 2, "mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2},
}


@pytest.fixture(scope="module")
def full_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("full") / "run"
    finish(start(run_flags(tiny, out, **OPTIONS), environment(tiny.cache)))
    return out


def arguments(tiny: Tiny, run: Path, **mesh: int) -> list[str]:
    """Begin the run, or resume it if there is one."""
    begin = run_flags(tiny, run, **OPTIONS, **mesh)
    return ["resume", str(run)] if (run / FILE).exists() else begin


def lines(run: Path) -> int:
    file = run / METRICS
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saves(run: Path) -> set[str]:
    folder = run / FOLDER
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def when_compiling(run: Path, chance: random.Random) -> Callable[[], bool]:
    """Some time after the folder is created; before that there is nothing to lose."""
    begun = time.monotonic()
    delay = chance.uniform(0.2, 2.0)
    return lambda: (run / FILE).exists() and time.monotonic() - begun > delay


def when_stepping(run: Path, chance: random.Random) -> Callable[[], bool]:
    """After some more lines of metrics: in a step or in an evaluation."""
    before, added = lines(run), chance.randint(5, 25)
    return lambda: lines(run) < before or lines(run) >= before + added


def when_saving(run: Path, chance: random.Random) -> Callable[[], bool]:
    """Just after a checkpoint has begun to be written."""
    before, begun = saves(run), lines(run)
    return lambda: lines(run) != begun and bool(saves(run) - before)


MOMENTS = {"compiling": when_compiling, "stepping": when_stepping, "saving": when_saving}


def kill(tiny: Tiny, run: Path, kind: str, chance: random.Random, **mesh: int) -> bool:
    """Start or resume the run, kill it at such a moment; returns whether it was killed before it ended."""
    cache = None if kind == "compiling" else tiny.cache
    process = start(arguments(tiny, run, **mesh), environment(cache, DEVICES if mesh else 1))
    moment = MOMENTS[kind](run, chance)
    while process.poll() is None and not moment():
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03))
    process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


def same_run(run: Path, full_run: Path) -> None:
    assert metrics_of(run) == metrics_of(full_run)
    assert saved_steps(run) == saved_steps(full_run)
    assert same_bits(state_of(run, STEPS), state_of(full_run, STEPS))


def kill_and_resume(tiny: Tiny, run: Path, kills: int, **mesh: int) -> None:
    """Kill the run that often, each time resuming it, and then let it end."""
    chance = random.Random(kills)
    done, seen = 0, []
    for kind in itertools.islice(itertools.cycle(("stepping", "saving", "compiling")), kills):
        if not kill(tiny, run, kind, chance, **mesh):
            shutil.rmtree(run)  # it finished: start another one
        else:
            done += 1
        seen.append((kind, saved_steps(run) if (run / FOLDER).exists() else []))
    print(f"{done} kills: {seen}")
    assert done >= kills * 0.6
    finish(start(arguments(tiny, run, **mesh), environment(tiny.cache, DEVICES if mesh else 1)))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tiny: Tiny, full_run: Path, tmp_path: Path, kills: int) -> None:
    kill_and_resume(tiny, tmp_path / "run", kills)
    same_run(tmp_path / "run", full_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_killed_on_a_mesh(tiny: Tiny, tmp_path: Path, name: str) -> None:
    full, run, mesh = tmp_path / "full", tmp_path / "run", MESHES[name]
    finish(start(arguments(tiny, full, **mesh), environment(tiny.cache, DEVICES)))
    kill_and_resume(tiny, run, 5, **mesh)
    same_run(run, full)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGUSR1,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_stops(
    tiny: Tiny, full_run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start(run_flags(tiny, run, **OPTIONS), environment(tiny.cache))
    while lines(run) < 9 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    err = finish(process, RESUME)
    assert json.loads((run / HEARTBEAT).read_text())["phase"] == "stopped"
    last = saved_steps(run)[-1]
    assert f"stopped after step {last}, saved; resume with: python -m train resume {run}" in err
    assert last < STEPS
    finish(start(["resume", str(run)], environment(tiny.cache)))
    assert metrics_of(run) == metrics_of(full_run)
    assert same_bits(state_of(run, STEPS), state_of(full_run, STEPS))


@pytest.mark.slow
def test_ctrl_c_while_compiling(tiny: Tiny, full_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run_flags(tiny, run, **OPTIONS), environment(None))
    while not (run / METRICS).exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(0.3)
    assert lines(run) == 0
    process.send_signal(signal.SIGINT)
    err = finish(process, RESUME)
    assert "Traceback" not in err
    assert saved_steps(run)[0] <= 2  # the signal is seen a step later, so that no step waits for it
    finish(start(["resume", str(run)], environment(tiny.cache)))
    same_run(run, full_run)
