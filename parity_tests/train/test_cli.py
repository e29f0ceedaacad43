"""`python -m train`: what it prints, its exit codes, and its one line of error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.child_process import ROOT
from parity_tests.train.corpus import word_tokenizer
from train.__main__ import main
from train.data.token_shards import open_tokens, read_index


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    lines = "".join(json.dumps({"body": f"a b {n}"}) + "\n" for n in range(100))
    (tmp_path / "a.jsonl").write_text(lines)
    word_tokenizer(tmp_path / "tok")
    return [
        "tokenize", str(tmp_path / "*.jsonl"), "--text-field", "body",
        "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "out"),
        "--validation-fraction", "0.2", "--shard-tokens", "100",
    ]  # fmt: skip


def test_tokenize(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == ""
    index = read_index(tmp_path / "out")
    train, validation = (len(open_tokens(tmp_path / "out", s)) for s in ("train", "validation"))
    assert train + validation == 400
    assert f"train: {train:,} tokens of {train // 4:,} documents" in err
    assert f"validation: {validation:,} tokens of {validation // 4:,} documents" in err
    assert err.endswith(f"written: {tmp_path}/out\n")
    assert len(index.splits["train"]) == -(-train // 100)
    assert main(arguments) == 0  # already there


def test_a_mistake_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/b.jsonl, line 1: found fields none, expected 'body' (--text-field)\n"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["tokenize"], "the following arguments are required: SRC, --tokenizer, --out"),
        (
            ["tokenise"],
            "COMMAND: found 'tokenise', expected one of run, resume, export, eval, report, autopsy, plan, "
            "sweep, coordinates, tokenize",
        ),
        ([], "the following arguments are required: COMMAND"),
        (["tokenize", "a", "--out"], "--out: expected one argument"),
        (["run", "--steps", "x"], "--steps: found 'x', expected an integer"),
        (
            ["run", "--optimizer.clip-norm", "x"],
            "--optimizer.clip-norm: found 'x', expected a number",
        ),
        (["run", "--stepps", "3"], "unknown option --stepps (did you mean --steps?)"),
        (["run", "--remat", "full"], "unknown option --remat (did you mean --model.remat?)"),
        (
            ["run", "--model.remat", "[/b]"],
            "--model.remat: found '[/b]', expected one of none, dots, full",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wrong: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(wrong) == 2
    program = (
        "python -m train" if wrong[:1] in ([], ["tokenise"]) else f"python -m train {wrong[0]}"
    )
    assert capsys.readouterr() == ("", f"error: {message}; see {program} --help\n")


def test_an_interrupt_says_how_to_go_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.data.tokenize.tokenize", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted: run the same command to continue\n")


def test_as_a_program(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.json").exists()
