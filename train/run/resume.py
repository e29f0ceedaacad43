"""Resume a run from its newest intact checkpoint."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax

from llama_jax.numerics.xla_options import (
    leave_loops_rolled,
    reserve_gpu_memory,
    reserve_host_threads,
)
from llama_jax.text.companions import RUN_TOKENIZER
from train import checkpoints, startup
from train.checkpoints import require_safe_path
from train.data import identity
from train.flags import parse_options
from train.model.training_state import TrainingState, require_intact
from train.option_checks import validate
from train.options import FILE, RunOptions, with_absolute_paths
from train.options_toml import flags_of_text
from train.program.build import run_program
from train.run.changes import rejected_changes
from train.run.continued import open_state
from train.run.diagnosis import NO_DIAGNOSIS, Diagnosis, require_possible
from train.run.folder import last_saved_step, replace_options
from train.run.lock import locked
from train.run.loop import train_loop
from train.run.processes import join_processes
from train.run.saves import emergency_folder
from train.run.training_data import data_of_run, training_windows


def resume(
    folder: Path,
    saved: RunOptions,
    options: RunOptions,
    *,
    until: int | None = None,
    quiet: bool = False,
    diagnosis: Diagnosis = NO_DIAGNOSIS,
) -> bool:
    """Train on from the newest intact checkpoint in `folder`, or from the start if there is none.

    Returns whether a signal has asked to stop.

    Args:
        saved: what the run's run.toml says.
        options: the same, with changes where they are allowed: how and where it computes, logging, where
            the same data now lies, and `steps` as far as `train.run.changes` allows.
        until, quiet, diagnosis: see `train_loop`.

    Raises:
        ValueError: as `train.run.begin.begin`; a folder that another process runs; options that must not
            change; data that is not what the run began with.
    """
    startup.lap("imports")
    leave_loops_rolled()  # in every process of a run, or its bits would change
    options = with_absolute_paths(options)
    _require_valid(saved, options)
    require_possible(diagnosis, options.steps)
    require_safe_path(folder)
    moved = identity.may_be_moved(folder, saved.data, options.data)
    expected = replace(saved, data=options.data) if moved else saved
    emergency = emergency_folder(folder, options.checkpoint.emergency_dir)
    done = max(last_saved_step(run) for run in (folder, emergency) if run is not None)
    state = open_state(saved.init_from) if not done and saved.init_from is not None else None
    if isinstance(state, TrainingState):
        require_intact(state)
    if state is not None:
        done = state.step
    _require_unedited(folder, saved, done)
    if rejected := rejected_changes(expected, options, done):
        raise ValueError(f"{folder}: these options cannot change on resume: {'; '.join(rejected)}")
    reserve_gpu_memory()
    reserve_host_threads()
    join_processes(options.distributed, folder)
    with ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(locked(folder))
        _require_tokenizer(folder, options)
        sources, config = data_of_run(folder, options)
        dataset = training_windows(options, config, sources)
        startup.lap("data")
        program = run_program(options, config)
        startup.lap("program")
        updated = replace(saved, steps=options.steps, data=options.data)
        if updated != saved and jax.process_index() == 0:
            replace_options(folder, updated)
        return train_loop(
            program,
            options,
            folder,
            sources,
            dataset,
            until=until,
            quiet=quiet,
            diagnosis=diagnosis,
        )


def _require_valid(saved: RunOptions, options: RunOptions) -> None:
    try:
        validate(options)
    except ValueError as error:
        if options != saved:
            raise
        # an earlier version allowed these options
        raise ValueError(
            f"{error}; such a run cannot be resumed: `python -m train export` its weights and begin a new "
            "run from them with --model.init-from"
        ) from None


def _require_tokenizer(folder: Path, options: RunOptions) -> None:
    """Raise ValueError if evaluations would not find the run's tokenizer."""
    path = folder / RUN_TOKENIZER
    if options.evaluation.every and not path.is_dir():
        raise ValueError(
            f"{path}: not found, expected the run's tokenizer, which evaluations need: restore it, or pass "
            "--evaluation.every 0"
        )


def _require_unedited(folder: Path, saved: RunOptions, done: int) -> None:
    """Raise ValueError if run.toml was edited such that the result would be another than so far.

    Every checkpoint has the options that it was saved with. Of the data, digests tell if it is the same.
    """
    facts = checkpoints.newest_facts(folder)
    if facts is None or not isinstance(text := facts.get("options"), str):
        return
    path = folder / checkpoints.FOLDER
    begun = parse_options(RunOptions(), flags_of_text(text, path), path)
    if edited := rejected_changes(replace(begun, data=saved.data), saved, done):
        raise ValueError(
            f"{folder / FILE}: was edited after the run began: {'; '.join(edited)}: change it back, or "
            "begin a new run with `python -m train run --toml`"
        )
