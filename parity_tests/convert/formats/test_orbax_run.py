"""Runs of `python -m train` as sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import convert
from parity_tests.convert.formats.gguf.tiny_gguf import same
from parity_tests.train.conftest import finished, tiny  # noqa: F401
from train.__main__ import main


def test_a_run_converts_to_what_it_exports(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    assert main(["export", str(finished), str(tmp_path / "exported")]) == 0
    convert.convert(finished, tmp_path / "out")
    assert (
        same(
            load_file(tmp_path / "out/model.safetensors"),
            load_file(tmp_path / "exported/model.safetensors"),
        )
        == []
    )
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        finished / "tokenizer/tokenizer.json"
    ).read_bytes()


def test_an_earlier_step(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    steps = sorted(int(p.name) for p in (finished / "checkpoints").iterdir() if p.name.isdigit())
    convert.convert(finished / "checkpoints" / str(steps[0]), tmp_path / "early")
    convert.convert(finished / "checkpoints" / str(steps[-1]), tmp_path / "late")
    convert.convert(finished, tmp_path / "newest")
    early, late, newest = (
        load_file(tmp_path / name / "model.safetensors") for name in ("early", "late", "newest")
    )
    assert same(late, newest) == []
    assert same(early, late) != []


def test_damaged_values_are_detected(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    """By the fingerprints of the run: other facts than the values', as a changed value would have."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    facts = run / "checkpoints" / str(steps[-1]) / "facts"
    shutil.rmtree(facts)
    shutil.copytree(run / "checkpoints" / str(steps[0]) / "facts", facts)
    with pytest.raises(ValueError, match="its values are not what was saved"):
        convert.convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="found no checkpoint, expected one"):
        convert.convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
