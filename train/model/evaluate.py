"""Validation loss, during a run, of a run's checkpoint or of a Hugging Face directory."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe
from llama_jax.files.paths import source_path
from llama_jax.loss import IGNORE_INDEX
from llama_jax.text.byte_lengths import byte_lengths
from llama_jax.text.companions import tokenizer_home
from llama_jax.text.tokenizer import load_tokenizer
from train.data.identity import require_identity
from train.data.placement import placed_batches
from train.data.sources import common_vocabulary, find_sources, require_same_tokenizer
from train.data.tokens import Source
from train.data.windows import windows
from train.model.restore import load_directory, restore_run
from train.options import FILE, Dtype, RunOptions, TokenOptions
from train.program.build import Program

# tokens of a window for a Hugging Face directory whose model has more positions
LONGEST = 2048


class Evaluation(NamedTuple):
    """Cross-entropy per token, in nats, over `num_tokens` labels; perplexity is its exponential.

    num_bytes: of text that the labels stand for; special tokens have none.
    """

    loss: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The cross-entropy of all labels in bits, by the bytes of their text; None if that has none."""
        if not self.num_bytes:
            return None
        return self.loss * self.num_tokens / (math.log(2) * self.num_bytes)


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """One evaluation over the labels of all."""
    if len(evaluations) == 1:
        return evaluations[0]
    count = sum(evaluation.num_tokens for evaluation in evaluations)
    total = sum(evaluation.loss * evaluation.num_tokens for evaluation in evaluations)
    size = sum(evaluation.num_bytes for evaluation in evaluations)
    return Evaluation(total / count, count, size)


def source_names(sources: Sequence[Source]) -> list[str]:
    """A short name for each source: the last part of its path, with a number where that is not enough."""
    names: list[str] = []
    for source in sources:
        name, number = source.path.name or str(source.path), 2
        while name in names:
            name, number = f"{source.path.name}-{number}", number + 1
        names.append(name)
    return names


def validation_windows(source: Source, length: int, vocab_size: int) -> Any:
    """Every window of the validation split, in order."""
    return windows(
        [source], split="validation", sequence_length=length, vocab_size=vocab_size, seed=0
    )


def require_labels(source: Source, length: int, vocab_size: int, limit: int) -> None:
    """Raise ValueError unless one of the first `limit` validation windows, or of all if 0, has a label."""
    dataset = validation_windows(source, length, vocab_size)
    count = min(len(dataset), limit or len(dataset))
    if not any((dataset[number]["labels"] != IGNORE_INDEX).any() for number in range(count)):
        raise ValueError(_no_labels(source))


def _no_labels(source: Source) -> str:
    return (
        f"{source.path}: found no token to predict in the batches of its validation split: hold out more "
        "documents, or evaluate more batches or none (--evaluation.every 0)"
    )


def evaluate(
    program: Program, params: Any, sources: Sequence[Source], tokenizer: Path, *, limit: int
) -> list[Evaluation]:
    """The loss over the first `limit` batches of each source's validation split; over all of them if 0.

    Args:
        tokenizer: the directory of the sources' tokenizer.

    Raises:
        ValueError: a source without a validation split, or without labels in these batches.
    """
    micro, rows, length = program.batch.input_ids.shape
    vocab_size = program.config.vocab_size
    lengths = _byte_lengths(tokenizer)
    # ids that only the model has stand for no text
    lengths = np.pad(lengths, (0, max(vocab_size - len(lengths), 0)))
    evaluations = []
    for source in sources:
        dataset = validation_windows(source, length, vocab_size)
        total, count = 0.0, 0
        with closing(placed_batches(program.batch, dataset)) as batches:
            for batch in itertools.islice(batches, limit or None):
                loss, tokens = jax.device_get(program.evaluate(params, batch))
                total += float(loss)
                count += int(tokens)
        if not count:
            raise ValueError(_no_labels(source))
        size = 0
        for number in range(min(len(dataset), limit * micro * rows or len(dataset))):
            labels = dataset[number]["labels"]
            size += int(lengths[labels[labels != IGNORE_INDEX]].sum())
        evaluations.append(Evaluation(total / count, count, size))
    return evaluations


@cache
def _byte_lengths(tokenizer: Path) -> np.ndarray:
    return byte_lengths(load_tokenizer(tokenizer))


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
    tokens: TokenOptions,
    average: bool = False,
) -> dict[str, Evaluation]:
    """The validation loss of a run or of a Hugging Face directory, by the names of the sources.

    Args:
        data: token directories; () for those of the run.
        options: of the run; None if `target` is a Hugging Face directory.
        limit: batches; 0 for all.
        step: of the run's checkpoint; None for the newest.
        dtype: of the computation, and for a directory of the parameters too.
        tokens: of data that other programs wrote; its tokenizer is by default that of the target.
        average: evaluate the run's average of the parameters.

    Raises:
        ValueError: no data for a directory that is not a run; data with another tokenizer; as
            `restore_run`, `load_params` and `evaluate`.
    """
    data_of_run = options is not None and not data
    if options is not None:
        data = data or options.data
        options = dataclasses.replace(
            options,
            batch_size=batch_size,
            micro_batches=1,
            sequence_length=sequence_length or options.sequence_length,
            model=dataclasses.replace(options.model, compute_dtype=dtype),
        )
        _, program, params = restore_run(target, options, step, average=average)
    else:
        if average:
            raise ValueError(
                f"average: {target} is not a run folder (no {FILE}); leave --average out"
            )
        target = source_path(target)
        if not target.is_dir():
            raise ValueError(f"{target}: {describe(target)}")
        if not data:
            raise ValueError(f"{target} is not a run folder (no {FILE}), so --data is required")
        longest = min(LlamaConfig.from_pretrained(target).max_position_embeddings, LONGEST)
        program, params = load_directory(
            target, dtype, batch_size=batch_size, sequence_length=sequence_length or longest
        )
    tokenizer = tokenizer_home(target)
    sources = find_sources(data, tokens, tokens.tokenizer or tokenizer)
    if data_of_run:
        require_identity(target, sources, "restore it, or name other data with --data")
    require_same_tokenizer(tokenizer, common_vocabulary(sources).tokenizer)
    evaluations = evaluate(program, params, sources, tokenizer, limit=limit)
    return dict(zip(source_names(sources), evaluations, strict=True))
