"""Continue, in a new folder, the run whose weights and optimizer state are in --init-from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.checkpoints.huggingface import load_params, place_tensors
from llama_jax.checkpoints.match import abstract_model
from llama_jax.checkpoints.names import name_table
from llama_jax.config import LlamaConfig
from llama_jax.models.causal_lm import LlamaForCausalLM
from train.data.identity import SHOWN
from train.data.tokens import Source
from train.model import torch_optimizer
from train.model.torch_optimizer import TorchOptimizer, read_optimizer
from train.model.training_state import (
    FOLDER,
    MANIFEST,
    MOMENTS,
    TrainingState,
    is_adam,
    read_state,
    require_intact,
    require_moments,
    require_no_extras,
    saved_options,
)
from train.options import RunOptions, require_local
from train.program.build import Program
from train.run.changes import rejected_changes


def options_to_continue(directory: Path) -> RunOptions:
    """The options that the state in `directory` comes with; the defaults for one of plain PyTorch.

    Raises:
        ValueError: a remote directory; as `open_state`.
    """
    require_local("init-from", directory)
    if (directory / FOLDER).exists():
        return saved_options(read_state(directory))
    _require_torch_state(directory)
    return RunOptions()


def open_state(directory: Path) -> TrainingState | TorchOptimizer:
    """The state in `directory`: its `training_state`, or else its optimizer.pt.

    Raises:
        ValueError: it has neither; as `read_state` or `read_optimizer`.
    """
    if (directory / FOLDER).exists():
        return read_state(directory)
    _require_torch_state(directory)
    return read_optimizer(directory)


def _require_torch_state(directory: Path) -> None:
    if not (directory / torch_optimizer.FILE).is_file():
        raise ValueError(
            f"init-from: {directory}: has neither {FOLDER}/{MANIFEST} nor {torch_optimizer.FILE}; to begin "
            "from its weights alone, use --model.init-from"
        )


def with_weights(options: RunOptions) -> RunOptions:
    """The options with --init-from also as the origin of the weights and the configuration."""
    if options.init_from is None:
        return options
    if options.model.init_from not in (None, options.init_from):
        raise ValueError(
            f"model.init-from: found {options.model.init_from} with --init-from {options.init_from}, whose "
            "weights belong to its optimizer state: leave one of them out"
        )
    return replace(options, model=replace(options.model, init_from=options.init_from))


def require_continuable(
    state: TrainingState | TorchOptimizer,
    options: RunOptions,
    config: LlamaConfig,
    sources: Sequence[Source],
) -> None:
    """Raise ValueError unless a run with these options can continue from the state.

    All files of a `TrainingState` are read, to compare their digests.
    """
    if options.optimizer.name != "adamw":
        raise ValueError(
            f"optimizer.name: found {options.optimizer.name} with --init-from, expected adamw"
        )
    require_no_extras(options)
    if isinstance(state, TorchOptimizer):
        torch_optimizer.require_fit(state, config, options.optimizer)
    else:
        _require_same_run(state, options)
        _require_same_data(state, sources)
        require_moments(state, config)
        require_intact(state)
    if state.step >= options.steps:
        raise ValueError(
            f"steps: found {options.steps}, expected more than {state.step}, the steps that are done"
        )


def continued_opt_state(state: TrainingState | TorchOptimizer, program: Program) -> Any:
    """The optimizer state of `program` with the moments and the step of `state`."""

    def moments(name: str, abstract: Any) -> Any:
        if isinstance(state, TrainingState):
            return load_params(LlamaForCausalLM, state.moment(name), abstract)
        table = name_table(abstract_model(LlamaForCausalLM, program.config, "float32"))
        return place_tensors(
            table, abstract, lambda tensor, index, out: state.read(name, tensor, index, out)
        )

    def continued(node: Any) -> Any:
        if not is_adam(node):
            # every other leaf counts steps
            return jax.device_put(jnp.asarray(state.step, node.dtype), node.sharding)
        fields = {field: moments(name, getattr(node, field)) for name, field in MOMENTS.items()}
        return node._replace(count=continued(node.count), **fields)

    return jax.tree.map(continued, program.opt_state, is_leaf=is_adam)


def _require_same_run(state: TrainingState, options: RunOptions) -> None:
    """As on resume; what only changes rounding may differ too, since another machine may need it."""
    saved = saved_options(state)
    if state.manifest["optimizer"].get("name") != "adamw" or saved.optimizer.name != "adamw":
        raise ValueError(f"{state.directory / FOLDER}: is of another optimizer than adamw")
    model = replace(
        saved.model,
        init_from=options.model.init_from,
        config=options.model.config,
        preset=options.model.preset,
        compute_dtype=options.model.compute_dtype,
        reduce_dtype=options.model.reduce_dtype,
    )
    expected = replace(
        saved,
        data=options.data,
        init_from=options.init_from,
        micro_batches=options.micro_batches,
        model=model,
        optimizer=replace(saved.optimizer, state_dtype=options.optimizer.state_dtype),
    )
    if rejected := rejected_changes(expected, options, state.step):
        raise ValueError(
            f"{state.directory}: these options cannot change in a run that continues: "
            f"{'; '.join(rejected)}"
        )


def _require_same_data(state: TrainingState, sources: Sequence[Source]) -> None:
    path = state.directory / FOLDER / MANIFEST
    listed = state.manifest["data"].get("sources")
    if not isinstance(listed, list) or len(listed) != len(sources):
        count = len(listed) if isinstance(listed, list) else 0
        raise ValueError(
            f"data: found {len(sources)} token directories, expected {count} by {path}"
        )
    for source, expected in zip(sources, listed, strict=True):
        directory, weight, digest = source.path, source.weight, source.digest()
        if digest != expected.get("digest"):
            raise ValueError(
                f"{directory}: found data with digest {digest[:SHOWN]}, expected "
                f"{str(expected.get('digest'))[:SHOWN]} by {path}: pass the run's data with --data"
            )
        if weight != expected.get("weight"):
            raise ValueError(
                f"{directory}: found weight {weight}, expected {expected.get('weight')} by {path}"
            )
