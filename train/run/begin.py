"""Begin a run in a new folder."""

import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import jax

from llama_jax.checkpoints.match import match_checkpoint
from llama_jax.checkpoints.weight_files import open_weights
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe
from llama_jax.formatting import summarize
from llama_jax.generation.config import read_generation_config
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.numerics.xla_options import (
    leave_loops_rolled,
    reserve_gpu_memory,
    reserve_host_threads,
)
from train import startup
from train.checkpoints import require_safe_path
from train.data.sources import common_vocabulary, find_sources, require_same_tokenizer
from train.data.token_directory import TokenDirectory
from train.data.tokens import Source, Vocabulary
from train.model.config import model_config
from train.monitoring.loggers import require_loggers
from train.option_checks import validate
from train.options import RunOptions, with_absolute_paths, with_defaults
from train.program.build import run_program
from train.run.continued import open_state, require_continuable, with_weights
from train.run.diagnosis import NO_DIAGNOSIS, Diagnosis, require_possible
from train.run.folder import require_new, write_folder
from train.run.lock import locked
from train.run.loop import train_loop
from train.run.processes import join_processes
from train.run.saves import emergency_folder
from train.run.training_data import training_windows


def begin(
    options: RunOptions,
    *,
    until: int | None = None,
    quiet: bool = False,
    diagnosis: Diagnosis = NO_DIAGNOSIS,
) -> bool:
    """Begin a run in the folder `options.out`, which must not hold one, and train to its end.

    Returns whether a signal has asked to stop.

    Args:
        until, quiet, diagnosis: see `train_loop`.

    Raises:
        DivergenceError: a loss that is not finite.
        ValueError: options that are wrong in themselves, or do not fit the data, model or devices; a
            checkpoint that cannot be saved.
    """
    startup.lap("imports")
    leave_loops_rolled()
    validate(options)
    require_possible(diagnosis, options.steps)
    options = with_weights(options)
    folder = options.out
    require_new(folder)
    require_safe_path(folder)
    require_loggers(options.log)
    reserve_gpu_memory()
    reserve_host_threads()
    join_processes(options.distributed, folder)
    options = with_defaults(with_absolute_paths(options), jax.default_backend())
    weights = options.model.init_from
    if weights is not None and not weights.is_dir():
        raise ValueError(f"model.init-from: {weights}: {describe(weights)}")
    sources = find_sources(options.data, options.tokens, options.tokens.tokenizer or weights)
    vocabulary = common_vocabulary(sources)
    tokenizer = weights or vocabulary.tokenizer
    if tokenizer != vocabulary.tokenizer:
        require_same_tokenizer(tokenizer, vocabulary.tokenizer)
    elif isinstance(sources[0], TokenDirectory) and (missing := sources[0].missing_tokenizer()):
        raise ValueError(f"{missing}: not found, expected the tokenizer of the data")
    config = model_config(options.model, vocabulary, options.sequence_length)
    dataset = training_windows(options, config, sources)
    startup.lap("data")
    program = run_program(options, config)
    startup.lap("program")
    if options.model.init_from is not None:
        _require_initial_weights(options, config, vocabulary, sources)
    if options.init_from is not None:
        require_continuable(open_state(options.init_from), options, config, sources)
    with ExitStack() as stack:
        if jax.process_index() == 0:
            # only now: whatever can be refused has been refused before there is a folder
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            write_folder(folder, options, config, sources, tokenizer)
            emergency = emergency_folder(folder, options.checkpoint.emergency_dir)
            if emergency is not None:  # of an earlier run in this folder, which is gone
                shutil.rmtree(emergency, ignore_errors=True)
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


def _require_initial_weights(
    options: RunOptions, config: LlamaConfig, vocabulary: Vocabulary, sources: Sequence[Source]
) -> None:
    """Raise ValueError if the weights of --model.init-from do not fit; only their headers are read.

    Warns:
        UserWarning: the data ends its documents with a token at which generation would not end.
    """
    directory = options.model.init_from
    assert directory is not None
    dtype = options.model.parameter_dtype
    match = match_checkpoint(LlamaForCausalLM, config, open_weights(directory), directory, dtype)
    if problems := [*match.problems, *(f"{name}: missing" for name in match.missing_head)]:
        raise ValueError(summarize(f"{directory}: {len(problems)} problems", problems))
    eos_ids = read_generation_config(directory, config).eos_token_ids
    # a chat ends with the token of its template
    chats = all(source.open("train").in_loss is not None for source in sources)
    eos_id = None if chats else vocabulary.eos_id
    if eos_ids and eos_id is not None and eos_id not in eos_ids:
        warnings.warn(
            f"the data ends its documents with token {eos_id}, but generation from {directory} "
            f"stops at {', '.join(map(str, eos_ids))}: name the token with `tokenize --eos`, or change the "
            "run's generation_config.json",
            stacklevel=2,
        )
