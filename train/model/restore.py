"""Load a trained model on one device: from a run's checkpoint or a Hugging Face directory."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llama_jax.checkpoints.huggingface import load_params
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM
from train import checkpoints
from train.options import Dtype, MeshOptions, ModelOptions, RunOptions
from train.program.average import is_average
from train.program.build import Program, run_program


def restore_run(
    folder: Path, options: RunOptions, step: int | None, *, average: bool = False
) -> tuple[int, Any, Any]:
    """(step, program, params) of a run's checkpoint on one device.

    Args:
        step: None for the newest checkpoint.
        average: restore the average of the parameters, in its own dtype.

    Raises:
        ValueError: no checkpoint, or none of that step; a run that keeps no average.
    """
    if average and options.average.decay is None:
        raise ValueError(
            f"average: {folder} keeps no average: begin a run with --average.decay, or average the weights "
            "of exports with `python -m convert --average`"
        )
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
        if average:
            return chosen, program, _restore_average(manager, program, chosen)
        return chosen, program, checkpoints.restore_params(manager, program.params, chosen)


def _restore_average(manager: Any, program: Program, step: int) -> Any:
    """The average of the parameters; nothing else of the optimizer's state is read."""

    def hide(node: Any) -> Any:
        hidden = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, node)
        return hidden._replace(average=node.average) if is_average(node) else hidden

    part = jax.tree.map(hide, program.opt_state, is_leaf=is_average)
    restored = checkpoints.restore_part(manager, program.params, part, step)
    (state,) = filter(is_average, jax.tree.leaves(restored, is_leaf=is_average))
    return state.average


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
