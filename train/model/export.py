"""Export a trained model as a Hugging Face directory with its tokenizer, and verify the export."""

import itertools
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from llama_jax.models.causal_lm import LlamaForCausalLM
from llama_jax.text.companions import copy_companions, tokenizer_home
from train.data.identity import require_identity
from train.data.sources import find_sources
from train.data.windows import batches
from train.model.evaluate import evaluate, pooled, validation_windows
from train.model.export_state import export_state, require_exportable
from train.model.restore import load_directory, restore_run
from train.model.training_state import FOLDER as STATE
from train.model.verify import relative_difference, tolerance, torch_loss
from train.monitoring.metrics_log import read_metrics
from train.options import FILE, RunOptions
from train.program.build import model_of


class Verification(NamedTuple):
    """Losses per token over the same windows; `reported` is None if the run did not evaluate that step."""

    reported: float | None
    ours: float
    torch: float
    num_tokens: int


def export_model(model: LlamaForCausalLM, directory: Path, run: Path) -> None:
    """Write the model and the run's tokenizer and generation config; every process must call it.

    Weights that are spread over several processes are gathered on each host.
    """
    if jax.process_count() > 1:
        model = jax.tree.map(
            lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), model
        )
    if jax.process_index() == 0:
        model.save_pretrained(directory)
        copy_companions(run, directory)


def export_run(
    folder: Path,
    options: RunOptions,
    directory: Path,
    *,
    step: int | None,
    dtype: Any,
    average: bool = False,
    with_optimizer: bool = False,
    batches: int | None = None,
) -> int:
    """Write a checkpoint of the run as a Hugging Face directory; returns its step.

    Args:
        dtype: of the weights that are written; None for that of the parameters.
        average: write the run's average of the parameters instead.
        with_optimizer: also write what training continues from, see `train.model.training_state`.
        batches: how many steps' batches that lists; None: all that remain.

    Raises:
        ValueError: as `restore_run`; `directory` is a file, or contains a run, a checkpoint or a training
            state; with the optimizer, as `require_exportable`.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: is a file; choose another directory to export to")
    if (directory / FILE).exists():
        raise ValueError(f"{directory}: contains a run; choose another directory to export to")
    if (directory / "config.json").exists():
        raise ValueError(
            f"{directory}: already contains a checkpoint; choose another directory or remove it"
        )
    if (directory / STATE).exists():
        raise ValueError(
            f"{directory}: already contains a training state; choose another directory or remove it"
        )
    if with_optimizer:
        if average:
            raise ValueError(
                "average: found with --with-optimizer, whose moments belong to the parameters: leave "
                "one of them out"
            )
        require_exportable(folder, options, dtype)
    chosen, program, params = restore_run(folder, options, step, average=average)
    if dtype is None and average:
        dtype = options.model.parameter_dtype
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    export_model(model_of(program, params), directory, folder)
    if with_optimizer:
        del params  # the moments take its place
        export_state(folder, options, directory, program, step=chosen, batches=batches)
    return chosen


def verify_export(
    folder: Path,
    options: RunOptions,
    directory: Path,
    *,
    step: int,
    dtype: Any,
    average: bool = False,
) -> Verification:
    """Compute the loss of the exported directory here and in PyTorch, on the run's validation windows.

    Args:
        dtype: of the weights that were written; None for that of the parameters.
        average: the directory has the average of the parameters, whose loss the run did not report.

    Raises:
        ValueError: transformers finds missing or extra tensors; PyTorch's loss differs from ours, or from
            what the run reported at that step.
    """
    sources = find_sources(options.data, options.tokens, tokenizer_home(folder))
    require_identity(folder, sources, "restore it, or export without --verify")
    rows, length = options.batch_size, options.sequence_length
    batch_count = options.evaluation.batches
    program, params = load_directory(directory, "float32", batch_size=rows, sequence_length=length)
    ours = pooled(evaluate(program, params, sources, tokenizer_home(folder), limit=batch_count))
    with ExitStack() as stack:
        parts = []
        for source in sources:
            dataset = validation_windows(source, length, program.config.vocab_size)
            read = batches(dataset, batch_size=rows, rows=range(rows))
            parts.append(itertools.islice(stack.enter_context(closing(read)), batch_count or None))
        theirs, count = torch_loss(directory, itertools.chain(*parts))
    lines = read_metrics(folder)
    reported = next(
        (
            line["validation_loss"]
            for line in lines
            if line["step"] == step and "validation_loss" in line and not average
        ),
        None,
    )
    run_dtypes = [options.model.compute_dtype, dtype or options.model.parameter_dtype]
    for name, value, dtypes in (
        ("this library's", ours.loss, ["float32"]),
        ("the run's", reported, run_dtypes),
    ):
        if value is None:
            continue
        difference, limit = relative_difference(value, theirs), max(map(tolerance, dtypes))
        if not difference <= limit:
            raise ValueError(
                f"{directory}: {name} loss {value} and PyTorch's {theirs} differ by {difference:.1e}, "
                f"expected at most {limit:.1e}"
            )
    return Verification(reported, ours.loss, theirs, count)
