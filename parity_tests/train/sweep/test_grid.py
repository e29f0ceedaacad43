"""Grids: every combination is a run with these options; mistakes are one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from train.options import SWEPT
from train.sweep.grid import parse_grid, trials_of
from train.sweep.trials import check_trials, rungs


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    grid = [
        "optimizer.learning_rate=1e-3,2e-3",
        "optimizer.clip-norm=None,1",
        "optimizer.offload=false",
    ]
    trials = trials_of(parse_grid(grid), replace(SWEPT, out=tmp_path, steps=7))
    values = [
        (
            trial.options.optimizer.learning_rate,
            trial.options.optimizer.clip_norm,
            trial.options.steps,
        )
        for trial in trials
    ]
    assert values == [(1e-3, None, 7), (1e-3, 1.0, 7), (2e-3, None, 7), (2e-3, 1.0, 7)]
    assert trials[1].folder == tmp_path / "trials" / "learning-rate=1e-3,clip-norm=1,offload=false"


def test_folders_of_values_that_are_no_file_names(tmp_path: Path) -> None:
    """Paths, brackets and long texts: each its own folder, in the same place."""
    texts = [f"evaluation.sample-prompt=a/b,a_b,a[b,{'x' * 300}"]
    trials = trials_of(parse_grid(texts), replace(SWEPT, out=tmp_path))
    folders = {trial.folder for trial in trials}
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "trials"}
    assert all("[" not in folder.name and len(folder.name) < 200 for folder in folders)


def test_axes_with_the_same_last_word(tmp_path: Path) -> None:
    texts = ["checkpoint.every=1,2", "evaluation.every=2,1"]
    trials = trials_of(parse_grid(texts), replace(SWEPT, out=tmp_path))
    assert len({trial.folder for trial in trials}) == 4


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "grid: is empty; give options and values"),
        (["optimizer.learning-rate"], "grid: found 'optimizer.learning-rate', expected NAME=VALUE"),
        (["optimizer.learning-rate=,"], "grid: optimizer.learning-rate has no values"),
        (["optimizer.rate=1"], "grid: found 'optimizer.rate', expected an option of `train run`, such as"),
        (["learning-rat=1"], "grid: found 'learning-rat', expected an option of `train run`, such as"),
        (["out=a,b"], "grid: out is the same for all trials"),
        (["steps=1", "steps=2"], "grid: steps is there twice"),
        (["steps=1,01"], "grid: steps has 01 twice"),
        (["steps=1,x"], "grid: --steps: "),
        (["optimizer.name=adam"], "grid: --optimizer.name: found 'adam', expected one of adamw"),
        (["deterministic=yes"], "grid: deterministic: found 'yes', expected true or false"),
    ],
)  # fmt: skip
def test_grids_that_are_wrong(grid: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        trials_of(parse_grid(grid), SWEPT)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_that_a_run_would_refuse(tmp_path: Path) -> None:
    """Before any trial begins, with the name of the trial."""
    options = replace(SWEPT, out=tmp_path)
    for text, message in (
        ("steps=300,0", "steps=0: steps: found 0, expected at least 1"),
        ("model.width=256,100", "width=100: model.width: found 100, but num_attention_heads of tiny-4m"),
        ("model.preset=tiny-4m,none", "preset=none: model.preset: found 'none', expected one of"),
        ("model.parametrization=mup", "parametrization=mup: model.mup-base-hidden-size: found none"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            check_trials(trials_of(parse_grid([text]), options))
        assert str(caught.value).startswith(message)


def test_rungs() -> None:
    assert rungs(100, 0) == [100]
    assert rungs(100, 3) == [12, 25, 50, 100]
    for halvings in (-1, 7):
        with pytest.raises(
            ValueError, match=r"^halving: found -?\d with 100 steps, expected 0 to 6"
        ):
            rungs(100, halvings)
