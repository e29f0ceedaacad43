"""Resume a run from its newest intact checkpoint."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax

from llama_jax.config import LlamaConfig
from llama_jax.numerics.xla_options import reserve_gpu_memory, reserve_host_threads
from llama_jax.text.companions import tokenizer_home
from train.checkpoints import require_safe_path
from train.data import identity
from train.data.sources import common_vocabulary, find_sources
from train.data.token_directory import TokenDirectory
from train.model.training_state import TrainingState, require_intact
from train.option_checks import validate
from train.options import RunOptions, with_absolute_paths
from train.program.build import run_program
from train.run.changes import rejected_changes
from train.run.continued import open_state
from train.run.folder import last_saved_step, replace_options
from train.run.lock import locked
from train.run.loop import train_loop
from train.run.processes import join_processes
from train.run.training_data import training_windows


def resume(folder: Path, saved: RunOptions, options: RunOptions) -> None:
    """Train on from the newest intact checkpoint in `folder`, or from the start if there is none.

    Args:
        saved: what the run's run.toml says.
        options: the same, with changes where they are allowed: how and where it computes, logging, where
            the same data now lies, and `steps` as far as `train.run.changes` allows.

    Raises:
        ValueError: as `train.run.begin.begin`; a folder that another process runs; options that must not
            change; data that is not what the run began with.
    """
    options = with_absolute_paths(options)
    _require_valid(saved, options)
    require_safe_path(folder)
    moved = identity.may_be_moved(folder, saved.data, options.data)
    expected = replace(saved, data=options.data) if moved else saved
    done = last_saved_step(folder)
    state = open_state(saved.init_from) if not done and saved.init_from is not None else None
    if isinstance(state, TrainingState):
        require_intact(state)
    if state is not None:
        done = state.step
    if rejected := rejected_changes(expected, options, done):
        raise ValueError(f"{folder}: these options cannot change on resume: {'; '.join(rejected)}")
    reserve_gpu_memory()
    reserve_host_threads()
    join_processes(options.distributed, folder)
    with ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(locked(folder))
        sources = find_sources(options.data, options.tokens, tokenizer_home(folder))
        for source in sources:
            if isinstance(source, TokenDirectory) and not source.path.exists():
                raise ValueError(
                    f"{source.path}: not found, expected the data of {folder}: restore it, or pass the "
                    "path that it was moved to with --data"
                )
        vocabulary = common_vocabulary(sources)
        remedy = "restore it, or begin a new run with `python -m train run`"
        identity.require_identity(folder, sources, remedy)
        config = LlamaConfig.from_pretrained(folder)
        if vocabulary.vocab_size > config.vocab_size:
            raise ValueError(
                f"{folder}: found a model with vocab_size {config.vocab_size}, expected at least "
                f"{vocabulary.vocab_size}, the data's"
            )
        dataset = training_windows(options, config, sources)
        program = run_program(options, config)
        updated = replace(saved, steps=options.steps, data=options.data)
        if updated != saved and jax.process_index() == 0:
            replace_options(folder, updated)
        train_loop(program, options, folder, sources, dataset)


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
