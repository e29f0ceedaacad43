"""`python -m train sweep`."""

from collections.abc import Sequence

from llama_jax.files.paths import local_path
from llama_jax.files.remote import remote_path
from llama_jax.formatting import console, printable
from train.checkpoints import require_safe_path
from train.options import RunOptions
from train.sweep.grid import parse_grid, trials_of
from train.sweep.outcome import JSON, PICTURE, outcome_table, write_outcome
from train.sweep.trials import check_trials, run_trials, rungs


def run_sweep(options: RunOptions, grid: Sequence[str], halvings: int) -> None:
    """Run all trials in `options.out`, or the rest of them, and show the outcome.

    Raises:
        ValueError: a grid or options that are wrong; a trial that fails other than by diverging.
    """
    if (remote := remote_path(options.out)) is not None:
        raise ValueError(f"out: {remote} is remote; a sweep runs on this machine: choose a folder")
    if options.distributed.enabled:
        raise ValueError("distributed.enabled: a sweep runs in one process: leave it out")
    if options.init_from is not None:
        raise ValueError(
            f"init-from: found {options.init_from}: a sweep begins runs at their first step; to begin from "
            "weights, use --model.init-from"
        )
    folder = local_path(options.out)
    axes = parse_grid(grid)
    trials = trials_of(axes, options)
    for trial in trials:
        require_safe_path(trial.folder)
    if len({trial.options.steps for trial in trials}) > 1 and halvings:
        raise ValueError("halving: found it with a grid over steps, expected one number of steps")
    rungs(options.steps, halvings)
    check_trials(trials)
    say = console(stderr=True, soft_wrap=True)
    say.print(f"{len(trials)} trials in {printable(str(folder))}")
    results = run_trials(trials, halvings, lambda line: say.print(printable(line), markup=False))
    write_outcome(folder, axes, trials, results)
    console().print(outcome_table(axes, trials, results))
    say.print(f"written: {printable(str(folder))} ({JSON}, {PICTURE})")
