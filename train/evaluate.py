"""Validation loss: of a run on the way, or of a Hugging Face directory."""

import itertools
import math
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.data.windows import batches, windows
from train.program.build import Program, place_batch, rows_of_process
from train.program.step import Batch

Source = tuple[Path, float]


class Evaluation(NamedTuple):
    """Cross-entropy per token, in nats, over `num_tokens` labels; perplexity is its exponential."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def placed_batches(
    program: Program, dataset: Any, *, start_step: int = 0
) -> Generator[Batch, None, None]:
    """Batches of `dataset` from `start_step` on, each process reading only its rows."""
    micro, rows, _ = program.batch.input_ids.shape
    mine = rows_of_process(program.batch)
    with closing(
        batches(dataset, batch_size=micro * rows, rows=mine, start_step=start_step)
    ) as read:
        for part in read:
            yield place_batch(program.batch, mine, part)


def validation_windows(sources: Sequence[Source], length: int, vocab_size: int) -> Any:
    """Every window of the validation split, in order."""
    return windows(
        sources, split="validation", sequence_length=length, vocab_size=vocab_size, seed=0
    )


def evaluate(program: Program, params: Any, sources: Sequence[Source], *, limit: int) -> Evaluation:
    """The loss over the first `limit` batches of the validation split, over all of them for 0.

    Raises:
        ValueError: a source without a validation split.
    """
    _, _, length = program.batch.input_ids.shape
    dataset = validation_windows(sources, length, program.config.vocab_size)
    total, count = 0.0, 0
    with closing(placed_batches(program, dataset)) as read:
        for batch in itertools.islice(read, limit or None):
            loss, tokens = jax.device_get(program.evaluate(params, batch))
            total += float(loss)
            count += int(tokens)
    return Evaluation(total / max(count, 1), count)
