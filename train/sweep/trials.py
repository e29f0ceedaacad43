"""Run the trials of a sweep; what is done already, from an earlier call or before a crash, is kept."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.flags import parse_options
from train.model.config import model_config
from train.monitoring.metrics_log import read_metrics
from train.option_checks import validate
from train.options import FILE, RunOptions, with_absolute_paths, with_defaults
from train.options_toml import flags_of
from train.program.mup import base_config
from train.program.step import DivergenceError
from train.run.begin import begin
from train.run.changes import fixed_options_changed
from train.run.folder import last_saved_step
from train.run.lock import locked
from train.run.resume import resume
from train.sweep.grid import Trial


class Result(NamedTuple):
    """What is known of a trial.

    step: steps done. loss: after that step, of validation or, of runs that do not evaluate, the mean of
    the last tenth of the steps; infinite if the run diverged, None if it has not begun.
    """

    step: int
    loss: float | None
    diverged: bool = False


def check_trials(trials: Sequence[Trial]) -> None:
    """Raise ValueError for the first trial that cannot be begun, or whose folder has another run."""
    for trial in trials:
        options = trial.options
        try:
            validate(options)
            base_config(options.model, model_config(options.model, None, options.sequence_length))
        except ValueError as error:
            raise ValueError(f"{trial.folder.name}: {error}") from None
        if (trial.folder / FILE).is_file():
            saved = _saved(trial.folder)
            expected = with_defaults(with_absolute_paths(options), jax.default_backend())
            changed = fixed_options_changed(saved, expected)
            if saved.steps != options.steps:
                changed.append(f"steps: found {options.steps}, expected {saved.steps}")
            if changed:
                raise ValueError(
                    f"{trial.folder}: is a run with other options: {'; '.join(changed)}; choose another "
                    "--out"
                )


def rungs(steps: int, halvings: int) -> list[int]:
    """The steps after which the better half of the trials goes on, and the last step.

    Raises:
        ValueError: fewer steps than can be halved so often.

    >>> rungs(400, 2)
    [100, 200, 400]
    """
    if halvings < 0 or steps >> halvings < 1:
        raise ValueError(
            f"halving: found {halvings} with {steps} steps, expected 0 to {steps.bit_length() - 1}"
        )
    return [steps >> halvings - rung for rung in range(halvings + 1)]


def run_trials(
    trials: Sequence[Trial], halvings: int, report: Callable[[str], None]
) -> list[Result]:
    """Run all trials to the first rung, the better half to the next and so on; results in their order.

    A run that diverges is a result; any other error ends the sweep.

    Args:
        report: shows a line.

    Raises:
        KeyboardInterrupt: a signal stopped a run, which is saved.
    """
    results = [Result(0, None)] * len(trials)
    going = list(range(len(trials)))
    for rung in range(halvings + 1):
        if rung:
            going.sort(key=lambda index: _loss_or_infinity(results[index]))
            going = sorted(going[: (len(going) + 1) // 2])
        for number, index in enumerate(going, start=1):
            begun = time.monotonic()
            until = rungs(trials[index].options.steps, halvings)[rung]
            results[index] = run_trial(trials[index], until)
            report(
                f"[{number}/{len(going)}] {trials[index].folder.name}: {in_words(results[index])} "
                f"({time.monotonic() - begun:.0f} s)"
            )
    return results


def run_trial(trial: Trial, until: int) -> Result:
    """Run a trial, or go on with it, up to a step. Raises KeyboardInterrupt if a signal stops it before."""
    folder = trial.folder
    if (diverged := _diverged_at(folder)) is not None:
        return Result(diverged, math.inf, diverged=True)
    if last_saved_step(folder) < until:
        try:
            if last_saved_step(folder):
                saved = _saved(folder)
                stopped = resume(folder, saved, saved, until=until, quiet=True)
            else:
                _remove_unsaved(folder)
                stopped = begin(trial.options, until=until, quiet=True)
        except DivergenceError:
            steps = [line["step"] for line in read_metrics(folder)]
            step = max(steps, default=0) + 1
            _mark(folder).write_text(f"{step}\n")
            return Result(step, math.inf, diverged=True)
        finally:
            jax.clear_caches()  # no other trial has the same program
        if stopped:
            raise KeyboardInterrupt
    return Result(until, loss_at(read_metrics(folder), until))


def loss_at(lines: Sequence[dict[str, Any]], step: int) -> float:
    """The validation loss at a step, or else the mean training loss of the last tenth of the steps."""
    for line in lines:
        if line["step"] == step and "validation_loss" in line:
            return _finite(line["validation_loss"])
    recent = [
        _finite(line["loss"])
        for line in lines
        if "loss" in line and step - max(step // 10, 1) < line["step"] <= step
    ]
    return sum(recent) / len(recent) if recent else math.inf


def in_words(result: Result) -> str:
    """The result, for a line or a cell."""
    if result.loss is None:
        return "not begun"
    if result.diverged:
        return f"diverged at step {result.step}"
    return f"loss {result.loss:.4f} at step {result.step}"


def _loss_or_infinity(result: Result) -> float:
    return math.inf if result.loss is None else result.loss


def _finite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _saved(folder: Path) -> RunOptions:
    path = folder / FILE
    return replace(parse_options(RunOptions(), flags_of(path), path), out=folder)


def _remove_unsaved(folder: Path) -> None:
    """Remove a run that was ended before it had saved anything."""
    if folder.is_dir():
        with locked(folder):
            shutil.rmtree(folder)


def _mark(folder: Path) -> Path:
    """Beside the folder of a run that diverged: the step, so that it is not run again."""
    return folder.with_name(f"{folder.name}.diverged")


def _diverged_at(folder: Path) -> int | None:
    mark = _mark(folder)
    return int(mark.read_text()) if mark.is_file() else None
