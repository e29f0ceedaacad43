"""Write the training state of a run beside its exported model, see `train.model.training_state`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.config import LlamaConfig
from llama_jax.files.staging import staged_directory, write_text
from llama_jax.text.companions import tokenizer_home
from train import checkpoints
from train.data.identity import require_identity
from train.data.sources import find_sources
from train.data.token_directory import TokenDirectory
from train.data.token_shards import read_index
from train.data.tokens import Source
from train.data.windows import window_numbers
from train.model.training_state import (
    BATCHES,
    FOLDER,
    FORMAT,
    MANIFEST,
    MOMENTS,
    digest_of,
    is_adam,
    listed_files,
    not_decayed,
    require_no_extras,
    without_machine,
)
from train.options import FILE as OPTIONS
from train.options import RunOptions, warmup_steps
from train.options_toml import to_toml
from train.program.build import Program, model_of

_STEPS_AT_ONCE = 1024  # of batches.bin


def require_exportable(folder: Path, options: RunOptions, dtype: Any) -> None:
    """Raise ValueError if the state cannot be written for torch, or the data is not there."""
    if options.optimizer.name != "adamw":
        raise ValueError(
            f"with-optimizer: found {options.optimizer.name}, expected adamw: torch has the same"
        )
    require_no_extras(options)
    if dtype is not None:
        raise ValueError(
            f"dtype: found {dtype} with --with-optimizer: leave it out, to keep the weights as they are"
        )
    sources = _sources(folder, options)
    for source in sources:
        if not isinstance(source, TokenDirectory):
            raise ValueError(
                f"{source.path}: is not a token directory, which --with-optimizer needs: resume_torch.py "
                "reads no other files; export without it"
            )
        if read_index(source.path).loss_mask:
            raise ValueError(
                f"{source.path}: was made with tokenize --chat: resume_torch.py knows no loss on a part "
                "of the tokens; export without --with-optimizer"
            )
    require_identity(folder, sources, "restore it, or export without --with-optimizer")


def export_state(
    folder: Path,
    options: RunOptions,
    directory: Path,
    program: Program,
    *,
    step: int,
    batches: int | None = None,
) -> None:
    """Write `directory/training_state`; the model is there already. One moment at a time is in memory.

    Args:
        folder: of the run.
        program: as `restore_run` returned it.
        batches: how many steps' batches to list; None: all that remain.

    Raises:
        ValueError: a checkpoint that is damaged.
        FileExistsError: there is a training state already.
    """
    sources = _sources(folder, options)
    remaining = max(options.steps - step, 0)
    listed = remaining if batches is None else min(batches, remaining)
    with staged_directory(directory / FOLDER, into_existing=False) as staging:
        for name, moment in _moments(folder, program, step):
            model_of(program, moment).save_pretrained(staging / name)
        write_text(staging / OPTIONS, to_toml(without_machine(options)))
        with (staging / BATCHES).open("wb") as file:
            for numbers in batch_numbers(options, sources, step, step + listed):
                file.write(numbers.astype("<i8").tobytes())
        manifest = describe(options, program.config, sources, step)
        manifest["files"] = {
            name: {"bytes": path.stat().st_size, "sha256": digest_of(path)}
            for name, path in listed_files(directory, staging).items()
        }
        write_text(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def batch_numbers(
    options: RunOptions, sources: Sequence[Source], first: int, last: int
) -> Iterator[np.ndarray]:
    """Source and window of each row of the batches of steps `first` to `last`: [steps, rows, 2] int64."""
    rows = options.batch_size
    order = window_numbers(sources, sequence_length=options.sequence_length, seed=options.seed)
    for start in range(first, last, _STEPS_AT_ONCE):
        stop = min(start + _STEPS_AT_ONCE, last)
        numbers = [order[number] for number in range(start * rows, stop * rows)]
        yield np.asarray(numbers, np.int64).reshape(-1, rows, 2)


def describe(
    options: RunOptions, config: LlamaConfig, sources: Sequence[Source], step: int
) -> dict[str, Any]:
    """The contents of state.json, without the files."""
    optimizer = options.optimizer
    return {
        "format": FORMAT,
        "step": step,
        "optimizer": {
            "name": optimizer.name,
            "betas": [optimizer.beta1, optimizer.beta2],
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "no_decay": not_decayed(config),
            "clip_norm": optimizer.clip_norm,
            "z_loss": optimizer.z_loss,
        },
        "schedule": {
            "name": optimizer.schedule,
            "peak": optimizer.learning_rate,
            "steps": options.steps,
            "warmup_steps": warmup_steps(optimizer, options.steps),
            "final_fraction": optimizer.final_fraction,
            "decay_fraction": optimizer.decay_fraction,
        },
        "data": {
            "sequence_length": options.sequence_length,
            "batch_size": options.batch_size,
            "micro_batches": options.micro_batches,
            # the step of the first batch in batches.bin
            "first_step": step,
            "sources": [_describe_source(source) for source in sources],
        },
        # keys of dropout are a function of the seed and the step
        "rng": {"seed": options.seed, "attention_dropout": config.attention_dropout},
        "compute_dtype": options.model.compute_dtype,
    }


def _sources(folder: Path, options: RunOptions) -> list[Source]:
    return find_sources(options.data, options.tokens, tokenizer_home(folder))


def _describe_source(source: Source) -> dict[str, Any]:
    index = read_index(source.path)
    return {
        "path": str(source.path),
        "weight": source.weight,
        "digest": source.digest(),
        "shards": [[shard.file, shard.tokens, shard.sha256] for shard in index.splits["train"]],
    }


def _moments(folder: Path, program: Program, step: int) -> Iterator[tuple[str, Any]]:
    """(torch's name, tree like the parameters) of AdamW's moments, one at a time in memory."""
    with closing(
        checkpoints.open_manager(folder, keep_last=1, keep_every=None, read_only=True)
    ) as manager:
        for name, field in MOMENTS.items():
            part = _only(program.opt_state, field)
            restored = checkpoints.restore_part(manager, program.params, part, step)
            (state,) = filter(is_adam, jax.tree.leaves(restored, is_leaf=is_adam))
            yield name, getattr(state, field)
            del restored, state


def _only(opt_state: Any, field: str) -> Any:
    """The abstract state with placeholders for all but one field of Adam's."""

    def hide(node: Any) -> Any:
        hidden = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, node)
        return hidden._replace(**{field: getattr(node, field)}) if is_adam(node) else hidden

    return jax.tree.map(hide, opt_state, is_leaf=is_adam)
