"""Replay the steps of a run: batches are functions of (seed, step), and a checkpoint is exact."""

import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.checkpoints.huggingface import load_params
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM
from train import checkpoints
from train.checkpoints import ALL_DAMAGED
from train.data.batch import Batch
from train.data.placement import place_batch, rows_of_process
from train.data.tokens import Source
from train.data.windows import Window, batches
from train.monitoring.history import read_events
from train.monitoring.metrics_log import read_metrics
from train.options import MeshOptions, RunOptions
from train.program.build import Program, initial_opt_state, initial_params, run_program
from train.program.donation import donatable
from train.run.loop import dropout_key
from train.run.training_data import data_of_run, training_windows

# (parameters, optimizer state)
State = tuple[Any, Any]


class DamagedError(ValueError):
    """A checkpoint that cannot be read."""


class Replay(NamedTuple):
    """A run that can be replayed.

    recorded: by step, the lines of metrics.jsonl that have a loss.
    rates: the learning rate of each step, counted from 0: as recorded, or else as the options say.
    saved: the steps of the checkpoints that are kept.
    """

    folder: Path
    options: RunOptions
    config: LlamaConfig
    sources: Sequence[Source]
    dataset: Any
    program: Program
    recorded: dict[int, dict[str, Any]]
    rates: np.ndarray
    saved: list[int]
    manager: ocp.CheckpointManager


def open_replay(folder: Path, options: RunOptions, stack: ExitStack) -> Replay:
    """Open a run for reading; nothing in its folder changes.

    Raises:
        ValueError: data that is gone or changed; a configuration that does not fit; files of the run that
            are not what they should be.
    """
    options = replace(options, optimizer=replace(options.optimizer, offload=False))
    sources, config = data_of_run(folder, options)
    evaluation = replace(options.evaluation, every=0)  # without the validation split
    dataset = training_windows(replace(options, evaluation=evaluation), config, sources)
    recorded = {line["step"]: line for line in read_metrics(folder) if "grad_norm" in line}
    program = _program(options, config)
    with jax.numpy_dtype_promotion("standard"):
        # a constant schedule returns a scalar
        scheduled = program.learning_rate(jnp.arange(options.steps)) + jnp.zeros(options.steps)
    rates = np.array(scheduled)
    for step, line in recorded.items():
        if step <= len(rates):
            rates[step - 1] = line["learning_rate"]
    if not np.allclose(rates, scheduled, rtol=1e-5, atol=0):
        # options were edited between two sessions: the rates that the run had, not those of the last ones
        program = _program(options, config, learning_rate=rates_of(rates))
    stack.enter_context(jax.set_mesh(program.mesh))
    manager = checkpoints.open_manager(folder, keep_last=1, keep_every=None, read_only=True)
    stack.callback(manager.close)
    saved = sorted(manager.all_steps())
    return Replay(
        folder, options, config, sources, dataset, program, recorded, rates, saved, manager
    )


def rates_of(rates: np.ndarray) -> Any:
    """A schedule that looks the rate of a step up."""
    return lambda step: jnp.asarray(rates, float)[step]


def _program(options: RunOptions, config: LlamaConfig, **changes: Any) -> Program:
    """The program of the run; on one device where those of the run are not here."""
    try:
        return run_program(options, config, **changes)
    except ValueError:
        one = replace(options, mesh=MeshOptions())
        return run_program(one, config, jax.devices()[:1], **changes)


def state_at(replay: Replay, step: int) -> State:
    """The state after `step` steps: of that checkpoint or, for 0, the initial one.

    Raises:
        DamagedError: a checkpoint that is damaged.
        ValueError: one of another model.
    """
    program = replay.program
    if step:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it falls back to another one
            try:
                restored = checkpoints.restore(
                    replay.manager,
                    program.params,
                    program.opt_state,
                    step,
                    model=program.config.to_dict(),
                )
            except ValueError as error:
                if not str(error).endswith(ALL_DAMAGED):
                    raise
                raise DamagedError(
                    f"{replay.folder}: the checkpoint of step {step} is damaged: remove it, and the replay "
                    "begins at an older one"
                ) from None
        assert restored is not None
        return restored.params, restored.opt_state
    source = replay.options.model.init_from
    if source is None:
        params = initial_params(program, replay.options.seed)
    else:
        params = donatable(load_params(LlamaForCausalLM, source, program.params))
    return params, initial_opt_state(program, params)


def batch_windows(replay: Replay, start: int) -> Generator[Window, None, None]:
    """The batches after step `start`, as arrays [rows, seq] on the host."""
    rows = rows_of_process(replay.program.batch)
    size = replay.options.batch_size
    with closing(batches(replay.dataset, batch_size=size, rows=rows, start_step=start)) as numbers:
        yield from numbers


def placed(replay: Replay, windows: Window) -> Batch:
    """A batch on the devices."""
    batch = replay.program.batch
    return place_batch(batch, rows_of_process(batch), windows)


def step_key(replay: Replay, step: int) -> Any:
    """The dropout key of a step, which counts from 1."""
    return dropout_key(replay.config, replay.options.seed, step - 1)


def to_host(state: State) -> State:
    """A copy of the state that no step overwrites."""
    return jax.tree.map(np.array, jax.device_get(state))


def to_device(replay: Replay, state: State) -> State:
    """The state on the devices again."""
    abstract = replay.program.params, replay.program.opt_state
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract)


def resumed_steps(replay: Replay) -> set[int]:
    """The steps after which the run was resumed."""
    return {event["step"] for event in read_events(replay.folder) if event["event"] == "resume"}
