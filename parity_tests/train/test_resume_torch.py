"""The parts of resume_torch.py against the program that it continues: learning rates, windows, losses."""

from __future__ import annotations

import runpy
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from parity_tests import resume_torch
from parity_tests.harness.child_process import ROOT
from parity_tests.train.corpus import token_directory
from parity_tests.train.runs import Tiny, metrics_of, saved_steps
from train.__main__ import main
from train.data.token_directory import TokenDirectory
from train.data.token_shards import read_index
from train.data.windows import window_numbers, windows
from train.program.schedules import learning_rate_schedule

SCHEDULES = [
    ("cosine", 20, 5, 0.1, 0.2),
    ("cosine", 20, 0, 0.0, 0.2),
    ("linear", 20, 1, 0.25, 0.2),
    ("linear", 1, 0, 0.5, 0.2),
    ("wsd", 30, 4, 0.1, 0.35),
    ("wsd", 30, 0, 0.0, 1.0),
    ("wsd", 7, 2, 0.0, 1e-3),
    ("constant", 10, 10, 0.1, 0.2),
    ("constant", 10, 3, 0.1, 0.2),
    ("constant", 10, 0, 0.1, 0.2),
]


@pytest.mark.parametrize(("name", "steps", "warmup", "final", "decay"), SCHEDULES)
def test_learning_rates(name: str, steps: int, warmup: int, final: float, decay: float) -> None:
    numbers = {"steps": steps, "warmup_steps": warmup, "final_fraction": final}
    fields = numbers | {"peak": 3e-3, "decay_fraction": decay}
    actual = [
        resume_torch.learning_rate(fields | {"name": name}, step) for step in range(steps + 3)
    ]
    with jax.enable_x64(True):
        schedule = learning_rate_schedule(name, **fields)
        expected = np.asarray([schedule(step) for step in range(steps + 3)])
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(("vocab", "length"), [(100, 4), (70_000, 7), (100, 50), (100, 400)])
def test_windows(vocab: int, length: int, tmp_path: Path) -> None:
    """Every window of several sources, in the order of training, whatever the shards and documents."""
    rng = np.random.default_rng(length)
    sources = []
    for number in range(2):
        shards = [
            [
                rng.integers(0, vocab, rng.integers(1, 12)).tolist()
                for _ in range(rng.integers(1, 9))
            ]
            for _ in range(3)
        ]
        directory = token_directory(tmp_path / f"{number}", shards, vocab_size=vocab)
        sources.append(TokenDirectory(directory, 1.0 + number))
    ours = windows(sources, split="train", sequence_length=length, vocab_size=vocab, seed=5)
    order = window_numbers(sources, sequence_length=length, seed=5)
    theirs = []
    for directory, _ in sources:
        shards = read_index(directory).splits["train"]
        listed = [[shard.file, shard.tokens, shard.sha256] for shard in shards]
        theirs.append(resume_torch.Source(directory, listed, length))
    assert {source for source, _ in (order[n] for n in range(30))} == {0, 1}
    for row in range(30):
        source, number = order[row]
        ids, positions, documents, labels = theirs[source].window(number)
        for name, actual in (
            ("input_ids", ids),
            ("position_ids", positions),
            ("segment_ids", documents),
            ("labels", labels),
        ):
            assert actual.dtype == torch.int64
            np.testing.assert_array_equal(actual.numpy(), ours[row][name], err_msg=name)


def test_other_data_is_refused(tmp_path: Path) -> None:
    one = token_directory(tmp_path / "one", [[[1, 2, 3]]])
    other = token_directory(tmp_path / "other", [[[1, 2, 4]]])
    listed = [[s.file, s.tokens, s.sha256] for s in read_index(one).splits["train"]]
    with pytest.raises(ValueError, match=r"other: not the data of the run; pass that with --data"):
        resume_torch.Source(other, listed, 2)


def test_it_is_short_and_needs_no_other_file() -> None:
    text = Path(resume_torch.__file__).read_text()
    assert len(text.splitlines()) < 150
    for name in ("llama_jax", "train", "convert", "parity_tests", "numpy", "jax"):
        assert f"import {name}" not in text
        assert f"from {name}" not in text


def resume(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run it as a program; returns the exit code."""
    monkeypatch.setattr("sys.argv", ["resume_torch.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "parity_tests" / "resume_torch.py"), run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    return 0


def test_the_commands_of_the_guide(
    finished: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    guide = (ROOT / "docs" / "pretraining.md").read_text()
    (block,) = (
        part for part in guide.split("```") if "resume_torch.py" in part and "--data" in part
    )
    export, torch_steps, run = (shlex.split(line)[1:] for line in block.strip().splitlines())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TOKENS").symlink_to(tiny.data)
    shutil.copytree(finished, tmp_path / "runs" / "a")
    assert main([*export[2:], "--step", "9"]) == 0
    assert torch_steps[0] == "parity_tests/resume_torch.py"
    small = ["--steps", "2", "--device", "cpu"]
    assert resume(monkeypatch, *torch_steps[1:], *small) == 0
    capfd.readouterr()
    assert resume(monkeypatch, *torch_steps[1:], *small) == 2
    assert capfd.readouterr().err.endswith("or CONTINUED exists\n")
    assert main(run[2:]) == 0
    assert saved_steps(tmp_path / "runs" / "b") == [12]
    losses, expected = (
        {line["step"]: line["loss"] for line in metrics_of(run) if "loss" in line}
        for run in (tmp_path / "CONTINUED", finished)
    )
    losses |= {
        line["step"]: line["loss"] for line in metrics_of(tmp_path / "runs" / "b") if "loss" in line
    }
    assert sorted(losses) == [10, 11, 12]
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, expected[step], rtol=1e-6)


def test_a_file_that_was_cut(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "hf"
    assert main(["export", str(finished), str(directory), "--with-optimizer", "--step", "9"]) == 0
    file = directory / "training_state" / "exp_avg" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    capfd.readouterr()
    assert resume(monkeypatch, str(directory), str(tmp_path / "out"), "--steps", "1") == 2
    assert capfd.readouterr().err == f"error: {file}: missing, or not what state.json lists\n"
    assert not (tmp_path / "out").exists()
