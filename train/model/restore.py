"""Load a trained model on one device: from a run's checkpoint or a Hugging Face directory."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoints.huggingface import load_params
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM
from train import checkpoints
from train.options import Dtype, MeshOptions, ModelOptions, RunOptions
from train.program.build import Program, run_program


def restore_run(folder: Path, options: RunOptions, step: int | None) -> tuple[int, Any, Any]:
    """(step, program, params) of a run's checkpoint on one device.

    Args:
        step: None for the newest checkpoint.

    Raises:
        ValueError: no checkpoint, or none of that step.
    """
    config = LlamaConfig.from_pretrained(folder)
    # nothing is trained, so a schedule that this version refuses must not be in the way
    defaults = RunOptions()
    optimizer = dataclasses.replace(
        defaults.optimizer,
        name=options.optimizer.name,
        state_dtype=options.optimizer.state_dtype,
    )
    options = dataclasses.replace(
        options, mesh=MeshOptions(), optimizer=optimizer, steps=defaults.steps
    )
    program = run_program(options, config, jax.devices()[:1])
    with closing(
        checkpoints.open_manager(folder, keep_last=1, keep_every=None, read_only=True)
    ) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise ValueError(f"{folder}: has no checkpoint yet")
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
