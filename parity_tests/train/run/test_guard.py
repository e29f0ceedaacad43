"""Runs with a guard and an average: decisions, resuming bit for bit, the batch of an event, exports."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parity_tests.train.runs import (
    Tiny,
    environment,
    finish,
    metrics_of,
    run_flags,
    same_bits,
    start,
    state_of,
)
from train import checkpoints
from train.__main__ import main
from train.data.sources import find_sources
from train.data.windows import batches, windows
from train.flags import parse_options
from train.model.restore import restore_run
from train.monitoring.metrics_log import read_metrics
from train.options import FILE, RunOptions
from train.options_toml import flags_of

WINDOW, SIGMA, DECAY, STEPS = 4, 1.2, 0.8, 18
OPTIONS: dict[str, Any] = {
    "steps": STEPS,
    "optimizer__schedule": "constant",
    "guard__action": "skip",
    "guard__window": WINDOW,
    "guard__loss_sigma": SIGMA,
    "guard__norm_sigma": SIGMA,
    "guard__non_finite": 1,
    "average__decay": DECAY,
    "checkpoint__every": 1,
    "checkpoint__keep_last": 99,
    "evaluation__every": 0,
}


@pytest.fixture(scope="module")
def guarded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guarded") / "run"
    assert main(run_flags(tiny, out, **OPTIONS)) == 0
    return out


def events(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "event" in line]


def expected_outliers(run: Path) -> list[int]:
    """The steps that are outliers by the rule, from the losses and norms of the log."""
    lines = [line for line in read_metrics(run) if "grad_norm" in line]
    window: list[np.ndarray] = []
    outliers = []
    for line in lines:
        value = np.array([line["loss"], line["grad_norm"]])
        last = np.array(window[-WINDOW:])
        if len(last) == WINDOW:
            bound = last.mean(0) + SIGMA * last.std(0, ddof=1)
            if (value > bound).any():
                outliers.append(line["step"])
            value = np.minimum(value, bound)
        window.append(value)
    return outliers


def test_the_steps_that_the_rule_names_are_skipped(guarded: Path) -> None:
    skipped = [event["step"] for event in events(guarded)]
    assert skipped == expected_outliers(guarded)
    assert skipped
    assert {event["event"] for event in events(guarded)} == {"skipped"}


def test_resumed_bit_for_bit(tiny: Tiny, guarded: Path, tmp_path: Path) -> None:
    """In the middle of the window, with an outlier after it."""
    run = tmp_path / "run"
    assert main(run_flags(tiny, run, **OPTIONS | {"steps": 7})) == 0
    assert main(["resume", str(run), f"--steps={STEPS}"]) == 0
    assert events(guarded)[-1]["step"] > 7
    assert metrics_of(run) == metrics_of(guarded)
    assert same_bits(state_of(run, STEPS), state_of(guarded, STEPS))


@pytest.mark.slow
def test_killed_and_resumed(tiny: Tiny, guarded: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run_flags(tiny, run, **OPTIONS), environment(tiny.cache))
    while process.poll() is None and not (run / checkpoints.FOLDER / "6").exists():
        pass
    process.kill()
    process.communicate()
    finish(start(["resume", str(run)], environment(tiny.cache)))
    assert metrics_of(run) == metrics_of(guarded)
    assert same_bits(state_of(run, STEPS), state_of(guarded, STEPS))


def test_an_event_names_what_was_in_the_batch(tiny: Tiny, guarded: Path) -> None:
    """Read from the files without the program's reader; in them 1 ends a document."""
    files = sorted(tiny.data.glob("train*.tokens"))
    tokens = np.concatenate([np.fromfile(file, "<u2").astype(np.int64) for file in files])
    dataset = windows(
        find_sources([str(tiny.data)]), split="train", sequence_length=16, vocab_size=64, seed=0
    )
    for event in events(guarded):
        with closing(
            batches(dataset, batch_size=8, rows=range(8), start_step=event["step"] - 1)
        ) as rest:
            batch = next(rest)
        for row, ids in zip(event["batch"], batch["input_ids"], strict=True):
            first, last = row["tokens"]
            assert row["source"] == str(tiny.data)
            assert np.array_equal(tokens[first:last], ids[: last - first])
            (ends,) = np.nonzero(tokens[first:last] == 1)
            assert row["document_ends"] == (first + ends + 1).tolist()


def test_the_average_of_a_run(
    tiny: Tiny, guarded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the mean, in float64, of the parameters after all steps that were not skipped."""
    options = parse_options(RunOptions(), flags_of(guarded / FILE), guarded / FILE)
    _, program, average = restore_run(guarded, options, None, average=True)
    skipped = {event["step"] for event in events(guarded)}
    steps = [step for step in range(1, STEPS + 1) if step not in skipped]
    weights = DECAY ** np.arange(len(steps) - 1, -1, -1)
    total: Any = None
    with closing(
        checkpoints.open_manager(guarded, keep_last=1, keep_every=None, read_only=True)
    ) as manager:
        for step, weight in zip(steps, weights / weights.sum(), strict=True):
            params = checkpoints.restore_params(manager, program.params, step)
            part = jax.tree.map(lambda leaf, w=weight: w * np.asarray(leaf, np.float64), params)
            total = part if total is None else jax.tree.map(np.add, total, part)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), average, total
    )
    out = tmp_path / "hf"
    assert main(["export", str(guarded), str(out), "--average"]) == 0
    printed = []
    for target in ([str(guarded), "--average"], [str(out), f"--data={tiny.data}"], [str(guarded)]):
        capsys.readouterr()
        assert main(["eval", *target, "--sequence-length", "16"]) == 0
        printed.append(capsys.readouterr().out.split("\n")[0])
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.slow
def test_pytorch_loads_an_average(
    guarded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(guarded), str(tmp_path / "hf"), "--average", "--verify"]) == 0
    assert "reported by the run none at that step" in capsys.readouterr().err


def test_mistakes_are_one_line(
    tiny: Tiny, guarded: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = str(tmp_path / "hf")
    for arguments, message in (
        (
            ["eval", str(finished), "--average"],
            f"average: {finished} keeps no average: begin a run",
        ),
        (["export", str(finished), hf, "--average"], f"average: {finished} keeps no average"),
        (["eval", str(tiny.data), "--average"], f"average: {tiny.data} is not a run folder"),
        (
            ["export", str(guarded), hf, "--average", "--with-optimizer"],
            "average: found with --with-optimizer, whose moments",
        ),
        (
            ["export", str(guarded), hf, "--with-optimizer"],
            "guard.action: found skip, expected None: a state that moves to torch",
        ),
        (
            ["resume", str(guarded), "--guard.window", "9"],
            f"{guarded}: these options cannot change on resume: guard.window: found 9, expected 4",
        ),
        (
            ["run", "--guard.action", "drop"],
            "--guard.action: found 'drop', expected one of None, skip",
        ),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}"), err
        assert err.count("\n") == 1
    assert not (tmp_path / "hf").exists()
