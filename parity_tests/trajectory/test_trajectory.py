"""Trajectories with a known departure, and of real runs: rounding is told from another learning rate."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.__main__ import main
from parity_tests.harness.child_process import ROOT
from parity_tests.train.conftest import tiny  # noqa: F401
from parity_tests.train.runs import Tiny, run_flags
from parity_tests.trajectory.logs import read_log
from train.__main__ import main as train
from train.monitoring.metrics_log import read_metrics

STEPS = 60


def losses(seed: int, departs: int | None = None) -> list[float]:
    """Losses that fall; each seed has a rounding of its own, which grows by 10% a step.

    From step `departs` on there is another 0.1% of the loss.
    """
    rng, step = np.random.default_rng(seed), np.arange(1, STEPS + 1)
    exact = 2 + 3 * np.exp(-step / 30)
    noise = 1e-7 * 1.1**step * rng.normal(size=STEPS)
    other = np.zeros(STEPS) if departs is None else 1e-3 * (step >= departs)
    return (exact * (1 + noise + other)).tolist()


def lines(values: Iterable[float], first: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [{"step": step, "loss": value} | more for step, value in enumerate(values, first)]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Path]:
    """a, b, c and d differ by rounding; departed does not."""
    made = {
        name: write(tmp_path / f"{name}.jsonl", lines(losses(n))) for n, name in enumerate("abcd")
    }
    made["departed"] = write(tmp_path / "departed.jsonl", lines(losses(1, departs=20)))
    return made


def run(*arguments: Path | str) -> int:
    return main(["trajectory", *map(str, arguments)])


def test_rounding(logs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(logs["a"], logs["b"], "--rounding", logs["c"], logs["d"]) == 0
    assert "\nrounding: the difference is at most " in capsys.readouterr().out


def test_a_departure_at_a_known_step(
    logs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [logs["a"], logs["departed"], "--rounding", logs["c"], logs["d"]]
    files = ["--json", tmp_path / "t.json", "--picture", tmp_path / "t.png"]
    assert run(*arguments, *files) == 1
    assert "\ndeparts at step 20: loss differs by 1.0e-03, " in capsys.readouterr().out
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["departs"] == 20
    assert content["metrics"]["loss"]["steps"] == list(range(1, STEPS + 1))
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert run(*arguments, "--factor", "1e6") == 0


def test_without_two_roundings(logs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is claimed, unless nothing differs."""
    assert run(logs["a"], logs["departed"]) == 0
    assert "whether it is rounding cannot be told without two runs" in capsys.readouterr().out
    assert run(logs["a"], logs["a"]) == 0
    assert "the same at every common step" in capsys.readouterr().out


def test_columns_are_aligned_by_step(
    tmp_path: Path, logs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One log begins later, has every second step, evaluations and a repeated line, and is cut off."""
    some = [line for line in lines(losses(1, departs=20)) if line["step"] >= 7 and line["step"] % 2]
    wrong = [{"step": 9, "loss": 99.0}, {"step": 10, "validation_loss": 3.0, "sample": "text"}]
    other = write(tmp_path / "some.jsonl", [*wrong, *some])
    other.write_text(other.read_text() + '{"step": 61, "lo')
    assert run(logs["a"], other, "--rounding", logs["c"], logs["d"]) == 1
    out = capsys.readouterr().out
    assert "7 to 59" in out
    assert "departs at step 21" in out


def test_what_the_steps_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", lines(losses(0), learning_rate=1e-3, num_tokens=100))
    changed = lines(losses(1), learning_rate=1e-3, num_tokens=100)
    changed[4]["learning_rate"], changed[8]["num_tokens"] = 1.01e-3, 99
    assert run(one, write(tmp_path / "other", changed)) == 0
    out = capsys.readouterr().out
    assert "learning_rate differs from step 5 on: 0.001 and 0.00101" in out
    assert "num_tokens differs from step 9 on: 100 and 99" in out


@pytest.mark.parametrize("form", ["maxtext", "csv", "tensorboard"])
def test_logs_of_other_programs(
    form: str, tmp_path: Path, logs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    values, path = losses(0), tmp_path / form
    if form == "maxtext":  # its steps begin at 0
        made = [
            {"learning/loss": value, "perf/mfu": 0.3, "step": float(step), "run_name": "r"}
            for step, value in enumerate(values)
        ]
        write(path, made)
    elif form == "csv":
        path = path.with_suffix(".csv")
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "run_name", "loss", "eval_loss"])
            writer.writeheader()
            writer.writerows(line | {"run_name": "r", "eval_loss": ""} for line in lines(values))
    else:
        writer = pytest.importorskip("tensorboardX").SummaryWriter(str(path))
        for step, value in enumerate(values, 1):
            writer.add_scalar("loss", value, step)
        writer.close()
    assert run(logs["a"], path, "--json", tmp_path / "t.json") == 0
    content = json.loads((tmp_path / "t.json").read_text())["metrics"]["loss"]
    assert content["steps"] == list(range(1, STEPS + 1))
    # TensorBoard keeps float32
    assert max(content["differences"]) <= (2.0**-24 if form == "tensorboard" else 0.0)


@pytest.mark.parametrize("form", ["metrics_file", "earlier", "csv"])
def test_evaluations_of_maxtext(form: str, tmp_path: Path) -> None:
    """Those after step 10, which it calls 9, and 20; its lines for each batch of them are left out.

    Earlier versions had none, but the time in the line of the whole evaluation.
    """
    theirs = []
    for step in range(20):
        evaluates = (step + 1) % 10 == 0
        if evaluates and form != "earlier":
            theirs += [
                {"eval/avg_loss": 9.0, "eval/step_time_seconds": 0.1, "step": float(batch)}
                for batch in range(12)
            ]
        theirs.append({"learning/loss": 1.0, "step": float(step)})
        if evaluates:
            loss = 3.0 + step
            theirs.append({"eval/avg_loss": loss, "eval/total_loss": 8 * loss, "step": float(step)})
            if form == "earlier":
                theirs[-1]["eval/step_time_seconds"] = 0.0
    ours = [{"step": step, "validation_loss": 2.0 + step} for step in (10, 20)]
    files = write(tmp_path / "maxtext", theirs), write(tmp_path / "ours", ours)
    if form == "csv":
        columns = sorted({name for line in theirs for name in line})
        rows = [",".join(str(line.get(name, "")) for name in columns) for line in theirs]
        table = tmp_path / "maxtext.csv"
        table.write_text("\n".join([",".join(columns), *rows]) + "\n")
        files = table, files[1]
    assert run(*files, "--json", tmp_path / "t.json") == 0
    metric = json.loads((tmp_path / "t.json").read_text())["metrics"]["validation_loss"]
    assert metric["steps"] == [10, 20]
    assert metric["differences"] == [0.0, 0.0]


def trainer_state(path: Path, values: list[float], every: int) -> Path:
    """What transformers' Trainer writes: means of the loss, with four decimals."""
    history: list[dict[str, Any]] = []
    for step in range(every, STEPS + 1, every):
        mean = round(float(np.mean(values[step - every : step])), 4)
        history.append({"epoch": step / 100, "loss": mean, "grad_norm": 1.0, "step": step})
        history.append({"epoch": step / 100, "eval_loss": mean, "step": step})
    history.append({"step": STEPS, "train_loss": 3.0, "train_runtime": 1.0})
    path.write_text(json.dumps({"global_step": STEPS, "log_history": history}, indent=2))
    return path


@pytest.mark.parametrize("every", [1, 10])
def test_means_of_several_steps(logs: dict[str, Path], tmp_path: Path, every: int) -> None:
    state = trainer_state(tmp_path / "trainer_state.json", losses(1), every)
    assert read_log(state).metrics["validation_loss"].keys() == {*range(every, STEPS + 1, every)}
    assert run(logs["a"], state, "--rounding", logs["c"], logs["d"]) == 0
    state = trainer_state(tmp_path / "other.json", losses(1, departs=20), every)
    assert run(logs["a"], state, "--rounding", logs["c"], logs["d"]) == 1


def torchtitan(step: int, loss: float) -> str:
    start = "[rank0]:2026-01-01 10:00:00,000 - root - INFO - \x1b[31mstep: "
    return f"{start}{step:2}  \x1b[32mloss: {loss:7.4f}  grad_norm:  1.2000  tps: 7,000  mfu: 3.91%"


def megatron(step: int, loss: float) -> str:
    start = (
        f" [2026-01-01 10:00:00] iteration {step:8}/     100 | consumed samples: {8 * step:12} | "
    )
    end = f"lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.200 |"
    return f"{start}elapsed time per iteration (ms): 10.0 | learning rate: 1.0E-04 | {end}"


@pytest.mark.parametrize(
    ("name", "head", "line"),
    [
        ("torchtitan.log", "a line of something else\n", torchtitan),
        ("megatron.txt", "", megatron),
        ("lightning.csv", "epoch,step,train_loss,lr-AdamW\n", lambda n, x: f"0,{n - 1},{x!r},0.1"),
        ("wandb.csv", '"Step","run - train/loss"\n', lambda n, x: f"{n},{x!r}"),
        ("spaces.tsv", "step\tloss\n", lambda n, x: f"{n}\t{x!r}"),
        ("excel.csv", "\ufeffstep;loss\n", lambda n, x: f"{n};{x!r}"),
        ("groups.jsonl", "", lambda n, x: json.dumps({"step": n, "metrics": {"loss": x}})),
    ],
)
def test_logs_in_other_forms(
    name: str, head: str, line: Any, logs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    for seed, departs in ((1, None), (1, 20)):
        rows = [line(n, value) for n, value in enumerate(losses(seed, departs), start=1)]
        path.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
        assert read_log(path).steps == [*range(1, STEPS + 1)]
        rounding = "--rounding", logs["c"], logs["d"]
        assert run(logs["a"], path, *rounding) == (0 if departs is None else 1)


def test_what_only_one_run_has_finite_is_no_rounding(
    logs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "nan.jsonl", lines([*losses(0)[:30], float("nan"), 3.0]))
    assert run(logs["a"], other) == 1
    assert "\ndeparts at step 31: loss is finite in one run alone" in capsys.readouterr().out


def test_a_loss_that_is_not_a_number(
    tmp_path: Path, logs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    values = losses(1)
    values[30] = float("nan")
    path = write(tmp_path / "nan", lines(values))
    arguments = [logs["a"], path, "--rounding", logs["c"], logs["d"]]
    files = ["--json", tmp_path / "t.json", "--picture", tmp_path / "t.png"]
    assert run(*arguments, *files) == 1
    assert "departs at step 31: loss differs by inf" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "t.json").read_text())["metrics"]["loss"]["differences"][30] is None
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad: has no metrics"),
        ('{"loss": 1}\n', "bad, line 1: has no step; found loss"),
        ('{"step": 1.5, "loss": 1}\n', "bad, line 1: has no step; found step, loss"),
        ('{"step": 1, "loss": 1}\n[1]\n', "bad, line 2: found a list, expected an object"),
        ('{"step": 1,\n"loss": 1}\n', "bad, line 1: not valid JSON ("),
        ('{"step": 1, "sample": "text"}\n', "bad: has no metrics"),
        ('{"step": Infinity, "loss": 1}\n', "bad, line 1: has no step; found step, loss"),
        ("\\x00", "bad, line 1: not valid JSON ("),
        ('{"step": 1, "accuracy": 1}\n', "no common metric among loss, grad_norm, validation_loss"),
        (
            '{"step": 900, "loss": 1}\n',
            "no common step: the one has steps 1 to 60, the other steps 900",
        ),
    ],
)
def test_logs_that_cannot_be_compared(
    text: str,
    message: str,
    tmp_path: Path,
    logs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad"
    bad.write_text(text)
    assert run(logs["a"], bad) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_files_that_are_damaged(
    tmp_path: Path, logs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    record = struct.pack("<QI", 4, 0) + b"\xff" * 4 + bytes(4)
    (tmp_path / "events.out.tfevents.1").write_bytes(record)
    for name, message in (
        ("bytes", "not UTF-8; expected JSON, CSV, an event file or printed lines"),
        ("events.out.tfevents.1", "a damaged event file ("),
    ):
        assert run(logs["a"], tmp_path / name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / name}: {message}")


def test_arguments_that_are_wrong(
    tmp_path: Path, logs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    late = write(tmp_path / "late", lines(losses(3), first=1000))
    for arguments, message in (
        ([tmp_path / "none"], "none: no such file or directory"),
        ([tmp_path], "has no metrics.jsonl"),
        ([logs["b"], "--factor", "0.5"], "factor: found 0.5, expected at least 1"),
        ([logs["b"], "--json", tmp_path / "no" / "t"], "directory does not exist"),
        ([logs["b"], "--rounding", logs["c"], late], "late: have no common step of loss"),
    ):
        assert run(logs["a"], *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_bits_that_float32_has_not(tmp_path: Path) -> None:
    """A sum in Python has digits beyond float32's; where the roundings do not differ, they do not count."""
    narrow = np.float32(losses(0)).tolist()
    wide = np.asarray(losses(0))
    paths = [
        write(
            tmp_path / name,
            [
                {"step": step, "loss": loss, "validation_loss": other}
                for step, (loss, other) in enumerate(zip(narrow, values.tolist(), strict=True), 1)
            ],
        )
        for name, values in (
            ("one", wide),
            ("other", wide * (1 + 1e-7)),
            ("far", wide * (1 + 1e-5)),
        )
    ]
    assert run(*paths[:2], "--rounding", paths[0], paths[0]) == 0
    assert run(*paths[::2], "--rounding", paths[0], paths[0]) == 1


def test_the_command_of_the_guide(
    tmp_path: Path,
    logs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guide = (ROOT / "docs" / "parity.md").read_text()
    (command,) = re.findall(r"^python -m parity_tests (trajectory .*)$", guide, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for run_name, log in (("a", "a"), ("b", "departed"), ("c", "c")):
        (tmp_path / "runs" / run_name).mkdir(parents=True)
        shutil.copy(logs[log], tmp_path / "runs" / run_name / "metrics.jsonl")
    assert main(command.split()) == 1
    assert "departs at step 20" in capsys.readouterr().out
    assert (tmp_path / "trajectory.png").is_file()


@pytest.mark.slow
def test_real_runs(
    tiny: Tiny,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another order of summation is rounding; 1% of the learning rate departs at once."""
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "two": {"micro_batches": 2},
        "four": {"micro_batches": 4},
        "rate": {"optimizer__learning_rate": 3.03e-3},
        "decay": {"optimizer__weight_decay": 0.101},
    }
    for name, change in changes.items():
        flags = run_flags(tiny, tmp_path / name, steps=40, checkpoint__every=40, **change)
        assert train(flags) == 0
    rounding = ["--rounding", tmp_path / "plain", tmp_path / "two"]
    assert len(read_metrics(tmp_path / "plain")) == 50
    capsys.readouterr()
    assert run(tmp_path / "two", tmp_path / "four", *rounding) == 0
    assert "rounding: " in capsys.readouterr().out
    assert run(tmp_path / "four", tmp_path / "rate", *rounding) == 1
    out = capsys.readouterr().out
    assert "learning_rate differs from step 1 on: 0.0015 and 0.001515" in out
    assert "departs at step 2: " in out
    assert run(tmp_path / "four", tmp_path / "decay", *rounding) == 1
    assert "learning_rate" not in capsys.readouterr().out
