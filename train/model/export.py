"""A trained model as a Hugging Face directory, tokenizer included, and PyTorch's word on it."""

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.companions import copy_companions
from train.data.identity import require_identity
from train.data.sources import find_sources
from train.data.windows import batches
from train.model.evaluate import evaluate, validation_windows
from train.model.restore import load_directory, restore_run
from train.model.verify import relative_difference, tolerance, torch_loss
from train.monitoring.metrics_log import read_metrics
from train.options import FILE, RunOptions
from train.program.build import model_of


class Verification(NamedTuple):
    """Losses per token of the same windows; None where the run reported none at that step."""

    reported: float | None
    ours: float
    torch: float
    num_tokens: int


def export_model(model: LlamaForCausalLM, directory: Path, run: Path) -> None:
    """Write the model and what goes with it in the folder of the run; every process must call it.

    Weights that lie on several processes' devices are gathered on each host.
    """
    if jax.process_count() > 1:
        model = jax.tree.map(
            lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), model
        )
    if jax.process_index() == 0:
        model.save_pretrained(directory)
        copy_companions(run, directory)


def export_run(
    folder: Path, options: RunOptions, directory: Path, *, step: int | None, dtype: Any
) -> int:
    """Write a checkpoint of the run as a Hugging Face directory; returns its step.

    Args:
        dtype: of the weights that are written; None keeps the parameters'.

    Raises:
        ValueError: as `restore_run`; a directory that is there as a file, or that is a run.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: found a file, expected a directory or a free name")
    if (directory / FILE).exists():
        raise ValueError(f"{directory}: found a run, expected another directory to export to")
    chosen, program, params = restore_run(folder, options, step)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    export_model(model_of(program, params), directory, folder)
    return chosen


def verify_export(
    folder: Path, options: RunOptions, directory: Path, *, step: int, dtype: Any
) -> Verification:
    """Evaluate the exported directory here and in PyTorch, on the run's own validation windows.

    Args:
        dtype: of the weights that were written, None for the parameters'.

    Raises:
        ValueError: transformers cannot load it whole; PyTorch's loss is not ours, or not what the run
            reported at that step.
    """
    sources = find_sources(options.data)
    require_identity(folder, sources, "restore it, or export without --verify")
    rows, limit, length = options.batch_size, options.evaluation.batches, options.sequence_length
    program, params = load_directory(directory, "float32", batch_size=rows, sequence_length=length)
    ours = evaluate(program, params, sources, limit=limit)
    dataset = validation_windows(sources, length, program.config.vocab_size)
    with closing(batches(dataset, batch_size=rows, rows=range(rows))) as read:
        theirs, count = torch_loss(directory, itertools.islice(read, limit or None))
    lines = read_metrics(folder)
    reported = next(
        (
            line["validation_loss"]
            for line in lines
            if line["step"] == step and "validation_loss" in line
        ),
        None,
    )
    found = Verification(reported, ours.loss, theirs, count)
    roundings = [options.model.compute_dtype, dtype or options.model.parameter_dtype]
    for name, value, rounded in (
        ("this library's", ours.loss, ["float32"]),
        ("the run's", reported, roundings),
    ):
        if value is None:
            continue
        apart, most = relative_difference(value, theirs), max(map(tolerance, rounded))
        if not apart <= most:
            raise ValueError(
                f"{directory}: {name} loss {value} and PyTorch's {theirs} are {apart:.1e} apart, "
                f"expected at most {most:.1e}"
            )
    return found
