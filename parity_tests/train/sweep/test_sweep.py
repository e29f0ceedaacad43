"""Sweeps: which trials go on, what is kept when the command is run again, what is shown."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.train.runs import (
    environment,
    finish,
    metrics_of,
    run_flags,
    same_bits,
    saved_steps,
    start,
    state_of,
)
from train.__main__ import main
from train.options import FILE, SWEPT, RunOptions, with_absolute_paths, with_defaults
from train.options_toml import to_toml
from train.program.step import DivergenceError
from train.sweep import trials as module
from train.sweep.grid import Trial, parse_grid, trials_of
from train.sweep.outcome import JSON, PICTURE, outcome_table, write_outcome
from train.sweep.trials import Result, check_trials, loss_at, run_trials


class Fake:
    """Runs whose loss is a function of learning rate and step, or that diverge, and leave a run's files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        monkeypatch.setattr(module, "begin", self.begin)
        monkeypatch.setattr(module, "resume", self.resume)

    def begin(self, options: RunOptions, *, until: int, quiet: bool) -> bool:
        options.out.mkdir(parents=True)
        complete = with_defaults(with_absolute_paths(options), "cpu")
        (options.out / FILE).write_text(to_toml(complete))
        return self.run(options, until)

    def resume(self, folder: Path, saved: RunOptions, options: RunOptions, **call: Any) -> bool:
        assert saved == options
        return self.run(replace(options, out=folder), call["until"])

    def run(self, options: RunOptions, until: int) -> bool:
        rate = options.optimizer.learning_rate
        self.calls.append((options.out.name, until))
        if rate >= 1:
            raise DivergenceError("step 1: found loss nan")
        line = {"step": until, "validation_loss": abs(math.log2(rate / 8e-3)) + 100 / until}
        with (options.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (options.out / "checkpoints" / str(until)).mkdir(parents=True)
        return False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def sweep_of(folder: Path, *rates: str) -> list[Trial]:
    axes = parse_grid([f"optimizer.learning-rate={','.join(rates)}"])
    return trials_of(axes, replace(SWEPT, out=folder, steps=100))


def test_the_better_half_goes_on(fake: Fake, tmp_path: Path) -> None:
    """Of 5 to 25 steps, 3 to 50 and 2 to 100; one that diverged is the worst."""
    trials = sweep_of(tmp_path, "2", "1e-3", "4e-3", "7e-3", "3e-2")
    results = run_trials(trials, 2, lambda line: None)
    assert [result.step for result in results] == [1, 25, 100, 100, 50]
    assert results[0].diverged
    assert results[0].loss == math.inf
    assert results[3].loss == pytest.approx(math.log2(8 / 7) + 1)
    names = {name: [step for n, step in fake.calls if n == name] for name, _ in fake.calls}
    assert names["learning-rate=7e-3"] == [25, 50, 100]


def test_what_is_done_is_kept(fake: Fake, tmp_path: Path) -> None:
    """Also a run that diverged; and a grid may get more values."""
    trials = sweep_of(tmp_path, "2", "4e-3")
    first = run_trials(trials, 0, lambda line: None)
    calls = list(fake.calls)
    check_trials(trials)
    assert run_trials(trials, 0, lambda line: None) == first
    assert fake.calls == calls
    more = run_trials(sweep_of(tmp_path, "2", "4e-3", "8e-3"), 0, lambda line: None)
    assert more[:2] == first
    assert fake.calls == [*calls, ("learning-rate=8e-3", 100)]


def test_a_folder_of_a_run_with_other_options(fake: Fake, tmp_path: Path) -> None:
    run_trials(sweep_of(tmp_path, "4e-3"), 0, lambda line: None)
    for change, message in (
        ({"batch_size": 4}, "batch-size: found 4, expected 8"),
        ({"steps": 50}, r".*; steps: found 50, expected 100"),
    ):
        axes = parse_grid(["optimizer.learning-rate=4e-3"])
        trials = trials_of(axes, replace(SWEPT, **{"out": tmp_path, "steps": 100} | change))
        with pytest.raises(ValueError, match=f"is a run with other options: {message}"):
            check_trials(trials)


def test_the_outcome(tmp_path: Path) -> None:
    axes = parse_grid(["optimizer.learning-rate=1e-3,2e-3", "optimizer.name=adamw,muon"])
    trials = trials_of(axes, replace(SWEPT, out=tmp_path))
    results = [Result(300, 3.0), Result(300, 2.5), Result(300, 2.0), Result(7, math.inf, True)]
    table = outcome_table(axes, trials, results)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns == [["1e-3", "2e-3"], ["3.0000", "2.0000 *"], ["2.5000 *", "diverged at step 7"]]
    write_outcome(tmp_path, axes, trials, results)
    written = json.loads((tmp_path / JSON).read_text())["trials"]
    assert [row["best"] for row in written] == [False, True, True, False]
    assert written[3]["loss"] is None
    assert written[2]["options"] == {"optimizer.learning-rate": "2e-3", "optimizer.name": "adamw"}
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_best_of_those_that_ran_longest(tmp_path: Path) -> None:
    """With halving, a loss after fewer steps is not compared with one after all of them."""
    axes = parse_grid(["optimizer.name=adamw,muon"])
    trials = trials_of(axes, replace(SWEPT, out=tmp_path))
    table = outcome_table(axes, trials, [Result(150, 2.0), Result(300, 3.0)])
    assert [str(cell) for cell in table.columns[1].cells] == ["2.0000 at step 150", "3.0000 *"]


def test_the_loss_without_an_evaluation() -> None:
    """The mean of the last tenth of the steps."""
    lines: list[dict[str, Any]] = [{"step": n, "loss": float(n)} for n in range(1, 31)]
    assert loss_at(lines, 20) == 19.5
    assert loss_at([*lines, {"step": 20, "validation_loss": 7.0}], 20) == 7.0
    assert loss_at([{"step": 1, "loss": None}], 1) == math.inf


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "grid: is empty"),
        (["--grid", "a=1"], "grid: found 'a', expected an option of `train run`"),
        (["--grid", "steps=10,20", "--halving", "1"], "halving: found it with a grid over steps"),
        (["--grid", "steps=10", "--halving", "x"], "--halving: "),
        (["--grid", "steps=10", "--steps", "10", "--halving", "4"], "halving: found 4 with 10 steps"),
        (["--grid", "seed=1", "--out", "s3://b/x"], "out: s3://b/x is remote"),
        (["--grid", "seed=1", "--init-from", "x"], "init-from: found x: a sweep begins runs at their"),
    ],
)  # fmt: skip
def test_commands_that_are_wrong(
    flags: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_sweep_that_is_killed(tiny: Any, tmp_path: Path) -> None:
    """Run again, it leaves finished trials alone and ends as one that was not killed, bit for bit; muP."""
    flags = run_flags(
        tiny,
        tmp_path,
        optimizer__name="muon",
        model__parametrization="mup",
        model__mup_base_hidden_size=16,
        checkpoint__every=1,
        steps=40,
    )[1:]
    grid = ["--grid", "optimizer.learning-rate=1e-3,3e-3", "--halving", "1"]
    env = environment(tiny.cache)

    def sweep(name: str) -> Any:
        return start(["sweep", *flags, "--out", str(tmp_path / name), *grid], env)

    process = sweep("whole")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "loss; * is the best of its column" in out
    process = sweep("killed")
    first, second = (
        tmp_path / "killed" / "trials" / f"learning-rate={rate}" for rate in ("1e-3", "3e-3")
    )
    while not (second / "checkpoints").is_dir() or len(saved_steps(second)) < 1:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # closes its pipes
    before = (first / "events.jsonl").read_text()
    process = sweep("killed")
    process.communicate(timeout=300)
    assert process.returncode == 0
    folders = {"1e-3": first, "3e-3": second}
    ended = [rate for rate, folder in folders.items() if 40 in saved_steps(folder)]
    assert len(ended) == 1
    if ended == ["3e-3"]:
        assert (first / "events.jsonl").read_text() == before
    for other in folders.values():
        one = tmp_path / "whole" / "trials" / other.name
        step = saved_steps(one)[-1]
        assert same_bits(state_of(one, step), state_of(other, step))
        assert metrics_of(one) == metrics_of(other)
    # a trial is a run: `resume` takes the one that was left at half its steps to its end
    (left,) = folders.keys() - ended
    folder = tmp_path / "whole" / "trials" / folders[left].name
    finish(start(["resume", str(folder)], env))
    assert saved_steps(folder)[-1] == 40
    losses = [line["loss"] for line in metrics_of(folder) if "loss" in line]
    assert len(losses) == 40
    assert np.isfinite(losses).all()
