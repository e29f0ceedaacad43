"""Fixed-length windows of tokens for training and validation, and batches of them, by Grain."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from llama_jax.loss import IGNORE_INDEX
from train.data.tokens import Source, Split, Tokens, document_ends, loss_mask, read_tokens

Window = dict[str, np.ndarray]

# Reading a window takes microseconds, so one thread a few batches ahead is enough, and it takes the
# interpreter lock from the training loop less often than several would.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def windows(
    sources: Sequence[Source],
    *,
    split: Split,
    sequence_length: int,
    vocab_size: int,
    seed: int,
) -> grain.MapDataset[Window]:
    """The windows of all sources, with random access: each element is a function of its number.

    "train" is endless: the windows of each source are shuffled by `seed`, anew in each epoch, and the
    sources are mixed evenly in proportion to their weights (to 1%). "validation" has every window of every
    source once, in order, whatever the weights and the seed. (For sources of less than a hundred windows,
    Grain needs milliseconds rather than microseconds for an element.)

    Args:
        sources: each with its weight.
        vocab_size: the model's.
        seed: from 0 to 2**32 - 1.

    Raises:
        ValueError: no source, a weight that is not a positive finite number, `sequence_length` or `seed`
            out of range, as `Source.open`; when an element is read, an id that is not below `vocab_size`.
    """
    if not sources:
        raise ValueError("sources: give at least one")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(
                f"{source.path}: found weight {source.weight}, expected a positive number"
            )
    if sequence_length < 1:
        raise ValueError(f"sequence_length: found {sequence_length}, expected at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: found {seed}, expected 0 to 2**32 - 1")
    datasets = [
        grain.MapDataset.source(_Windows(source.open(split), sequence_length, vocab_size))
        for source in sources
    ]
    if split == "validation":
        return grain.MapDataset.concatenate(datasets)
    return _mixed(datasets, sources, seed)


def window_numbers(
    sources: Sequence[Source], *, sequence_length: int, seed: int
) -> grain.MapDataset[tuple[int, int]]:
    """Which windows the training data of `windows` has: of each element the source and the number in it.

    Raises:
        ValueError: as `Source.open`.
    """

    def numbered(source: int, tokens: Tokens) -> grain.MapDataset[tuple[int, int]]:
        count = _window_count(tokens, sequence_length)
        return grain.MapDataset.range(count).map(lambda number: (source, number))

    datasets = [numbered(number, source.open("train")) for number, source in enumerate(sources)]
    return _mixed(datasets, sources, seed)


def _mixed(
    datasets: Sequence[grain.MapDataset[Any]], sources: Sequence[Source], seed: int
) -> grain.MapDataset[Any]:
    """One endless dataset of those of the sources, each shuffled anew in every epoch."""
    # a separate seed for each source, or two of one size would be shuffled alike
    seeds = np.random.SeedSequence(seed).generate_state(len(datasets), np.uint32)
    endless = [
        dataset.shuffle(seed=int(source_seed)).repeat()
        for dataset, source_seed in zip(datasets, seeds, strict=True)
    ]
    return grain.MapDataset.mix(endless, [source.weight for source in sources])


def batches(
    windows: grain.MapDataset[Window], *, batch_size: int, rows: Sequence[int], start_step: int = 0
) -> Generator[Window, None, None]:
    """Batches from step `start_step` on: step s has the windows s * batch_size + r, for r in `rows`.

    So the batch of a step depends neither on where reading began nor on how many processes share it.
    Batches are prefetched in a thread, which ends with the iterator (`close()`). If the windows end, the
    last batch is filled up with windows of padding.

    Args:
        batch_size: of all processes together.
        rows: the rows of the batch that this process reads, each from 0 to batch_size - 1.

    Returns:
        A generator of dictionaries as `window` has them, each array [len(rows), sequence_length].

    Raises:
        ValueError: a row outside the batch, a negative step.
    """
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows: found {list(rows)}, expected some of 0 to {batch_size - 1}")
    if start_step < 0:
        raise ValueError(f"start_step: found {start_step}, expected at least 0")
    count = len(windows)
    steps = -(-count // batch_size)

    def batch(step: int) -> Window:
        numbers = [step * batch_size + row for row in rows]
        # past the end Grain starts over, which would count windows twice
        rows_of_batch = [
            windows[number] if number < count else _padding(windows[0]) for number in numbers
        ]
        return {name: np.stack([row[name] for row in rows_of_batch]) for name in rows_of_batch[0]}

    dataset = grain.MapDataset.range(start_step, max(steps, start_step)).map(batch)
    return _closing(dataset.to_iter_dataset(_READ_AHEAD))


def window(tokens: Tokens, number: int, sequence_length: int, vocab_size: int) -> Window:
    """Window `number` of S = sequence_length tokens, from number * S on, and one more for the last label.

    The last window is padded with zeros, so that no token is dropped. Documents do not see each other.

    Returns:
        A dictionary of int32 [S]: input_ids; labels, the next token, or IGNORE_INDEX where that belongs to
        another document, is not in the loss, or there is none; segment_ids, 0 for the first document in the
        window, 1 for the next, with padding as the last; position_ids, from 0 in each document, and from 0
        at the start of the window in a document that began before it.

    Raises:
        ValueError: an id that is not below `vocab_size`.
    """
    start = number * sequence_length
    stop = min(start + sequence_length + 1, len(tokens))
    ids = np.zeros(sequence_length + 1, np.int32)
    ids[: stop - start] = read_tokens(tokens, start, stop, vocab_size)
    begins = np.zeros(sequence_length + 1, np.int32)
    ends = document_ends(tokens, start, stop) - start
    begins[ends[ends <= sequence_length]] = (
        1  # the next document, or padding, begins where one ends
    )
    segments = np.cumsum(begins, dtype=np.int32)
    labels = np.where(segments[1:] == segments[:-1], ids[1:], np.int32(IGNORE_INDEX))
    labels[stop - start - 1 :] = IGNORE_INDEX
    if (in_loss := loss_mask(tokens, start, stop)) is not None:
        labels[: stop - start - 1][~in_loss[1:]] = IGNORE_INDEX
    positions = np.arange(sequence_length, dtype=np.int32)
    return {
        "input_ids": ids[:-1],
        "labels": labels,
        "segment_ids": segments[:-1],
        "position_ids": positions - np.maximum.accumulate(np.where(begins[:-1], positions, 0)),
    }


@dataclass(frozen=True)
class _Windows:
    """The windows of one source, as a Grain data source."""

    tokens: Tokens
    sequence_length: int
    vocab_size: int

    def __len__(self) -> int:
        return _window_count(self.tokens, self.sequence_length)

    def __getitem__(self, number: int) -> Window:
        return window(self.tokens, number, self.sequence_length, self.vocab_size)


def _window_count(tokens: Tokens, sequence_length: int) -> int:
    # a last token that is only a label needs no window
    return max(1, -(-(len(tokens) - 1) // sequence_length))


def _closing(dataset: grain.IterDataset[Window]) -> Generator[Window, None, None]:
    """The elements; closing the generator stops the thread."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _padding(like: Window) -> Window:
    """A window of padding."""
    length = len(like["labels"])
    return {
        "input_ids": np.zeros(length, np.int32),
        "labels": np.full(length, IGNORE_INDEX, np.int32),
        "segment_ids": np.zeros(length, np.int32),
        "position_ids": np.arange(length, dtype=np.int32),
    }
