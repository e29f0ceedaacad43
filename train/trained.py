"""A trained model from where it lies, on one device: a run's checkpoint, or a Hugging Face directory."""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoints.huggingface import load_params
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.companions import tokenizer_home
from train.data.identity import require_identity
from train.data.sources import common_index, find_sources, require_same_tokenizer
from train.evaluate import Evaluation, evaluate
from train.options import FILE, Dtype, MeshOptions, ModelOptions, RunOptions
from train.program.build import Program, run_program
from train.run import checkpoints

LONGEST = 2048


def restore_run(folder: Path, options: RunOptions, step: int | None) -> tuple[int, Any, Any]:
    """(step, program, params) of a run's checkpoint, the newest for None, on one device.

    Raises:
        ValueError: no checkpoint, or none of that step.
    """
    config = LlamaConfig.from_pretrained(folder)
    # nothing is trained here: whatever the run's schedule was, its weights can be had
    nothing = RunOptions()
    options = dataclasses.replace(
        options, mesh=MeshOptions(), optimizer=nothing.optimizer, steps=nothing.steps
    )
    program = run_program(options, config, jax.devices()[:1])
    with closing(
        checkpoints.open_manager(folder, keep_last=1, keep_every=None, read_only=True)
    ) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise ValueError(f"{folder}: found no checkpoint, expected one")
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise ValueError(f"step: found {chosen}, expected one of {', '.join(map(str, steps))}")
        return chosen, program, checkpoints.restore_params(manager, program.params, chosen)


def load_directory(
    directory: Path, dtype: Dtype, *, batch_size: int, sequence_length: int
) -> tuple[Program, Any]:
    """(program, params) of a Hugging Face directory, parameters and computation in `dtype`."""
    options = RunOptions(
        batch_size=batch_size,
        sequence_length=sequence_length,
        model=ModelOptions(parameter_dtype=dtype, compute_dtype=dtype),
    )
    config = LlamaConfig.from_pretrained(directory)
    program = run_program(options, config, jax.devices()[:1])
    return program, load_params(LlamaForCausalLM, directory, program.params)


def evaluate_target(
    target: Path,
    data: Sequence[str],
    options: RunOptions | None,
    *,
    limit: int,
    batch_size: int,
    sequence_length: int | None,
    step: int | None,
    dtype: Dtype,
) -> Evaluation:
    """The validation loss of a run or of a Hugging Face directory.

    Args:
        data: token directories; () for those of the run.
        options: of the run; None where `target` is a Hugging Face directory.
        limit: batches; 0 for all.

    Raises:
        ValueError: no data for a directory that is no run; data of another tokenizer; and what
            `restore_run`, `load_params` and `evaluate` refuse.
    """
    own = options is not None and not data
    if options is not None:
        data = data or options.data
        options = dataclasses.replace(
            options,
            batch_size=batch_size,
            micro_batches=1,
            sequence_length=sequence_length or options.sequence_length,
            model=dataclasses.replace(options.model, compute_dtype=dtype),
        )
        _, program, params = restore_run(target, options, step)
    else:
        if not data:
            raise ValueError(f"data: found none, expected some, for {target} is no run ({FILE})")
        longest = min(LlamaConfig.from_pretrained(target).max_position_embeddings, LONGEST)
        program, params = load_directory(
            target, dtype, batch_size=batch_size, sequence_length=sequence_length or longest
        )
    sources = find_sources(data)
    if own:
        require_identity(target, sources, "restore it, or name other data with --data")
    common_index(sources)
    require_same_tokenizer(tokenizer_home(target), sources[0][0])
    return evaluate(program, params, sources, limit=limit)
