"""Windows of tokens as training and validation read them, and batches of them; by Grain.

Importing Grain imports JAX, as everything of `llama_jax` does; no device is started by it.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from llama_jax.loss import IGNORE_INDEX
from train.data.token_shards import Split, Tokens, document_ends, open_tokens, read_tokens

Window = dict[str, np.ndarray]

# Reading a window takes microseconds, so one thread some batches ahead is enough, and takes the interpreter
# from the training loop less often than several would.
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def windows(
    sources: Sequence[tuple[Path, float]],
    *,
    split: Split,
    sequence_length: int,
    vocab_size: int,
    seed: int,
) -> grain.MapDataset[Window]:
    """The windows of `window`, over the sources: random access, each element a function of its number.

    "train" has no end: the windows of each source in an order that `seed` gives, another in each epoch, and
    the sources mixed evenly in proportion to their weights (to 1%). "validation" has every window of every
    source once, in order; weights and seed do not matter. (Grain takes milliseconds to shuffle an
    element where a source has less than a hundred windows, else microseconds.)

    Args:
        sources: directories of `train.data.token_shards`, each with its weight.
        vocab_size: the model's.
        seed: from 0 to 2**32 - 1.

    Raises:
        ValueError: no source, a weight that is not a positive finite number, `sequence_length` or `seed`
            out of range, or a directory that `open_tokens` refuses. Reading an element: an id that is not
            below `vocab_size`.
    """
    if not sources:
        raise ValueError("sources: found none, expected at least one")
    for directory, weight in sources:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"{directory}: found weight {weight}, expected a positive number")
    if sequence_length < 1:
        raise ValueError(f"sequence_length: found {sequence_length}, expected at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: found {seed}, expected 0 to 2**32 - 1")
    datasets = [
        grain.MapDataset.source(
            _Windows(open_tokens(directory, split), sequence_length, vocab_size)
        )
        for directory, _ in sources
    ]
    if split == "validation":
        return grain.MapDataset.concatenate(datasets)
    # a seed of its own for each source: two of a size would else be shuffled alike
    seeds = np.random.SeedSequence(seed).generate_state(len(datasets), np.uint32)
    endless = [
        dataset.shuffle(seed=int(own)).repeat()
        for dataset, own in zip(datasets, seeds, strict=True)
    ]
    return grain.MapDataset.mix(endless, [weight for _, weight in sources])


def batches(
    windows: grain.MapDataset[Window], *, batch_size: int, rows: Sequence[int], start_step: int = 0
) -> Generator[Window, None, None]:
    """Batches of step `start_step` and on: of step s the windows s * batch_size + r, for r in `rows`.

    So the batch of a step does not depend on where reading began, nor on how many processes share it, each
    with rows of its own. Batches are made ahead in a thread, which ends with the iterator (`close()`).
    The last batch of windows that end is filled with windows of nothing but padding.

    Args:
        batch_size: of all processes together.
        rows: which of the batch this process reads, each from 0 to batch_size - 1.

    Returns:
        A generator of dictionaries as `window` has them, each array [len(rows), sequence_length].

    Raises:
        ValueError: a row that is not in the batch, a negative step.
    """
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows: found {list(rows)}, expected some of 0 to {batch_size - 1}")
    if start_step < 0:
        raise ValueError(f"start_step: found {start_step}, expected at least 0")
    count = len(windows)
    steps = -(-count // batch_size)

    def batch(step: int) -> Window:
        numbers = [step * batch_size + row for row in rows]
        # past the end Grain begins again, which would count windows twice
        found = [windows[number] if number < count else _nothing(windows[0]) for number in numbers]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}

    dataset = grain.MapDataset.range(start_step, max(steps, start_step)).map(batch)
    return _closing(dataset.to_iter_dataset(_READ_AHEAD))


def window(tokens: Tokens, number: int, sequence_length: int, vocab_size: int) -> Window:
    """Window `number` of S = sequence_length tokens: those from number * S, and the one after for a label.

    The last window is filled with zeros; nothing is left out. Documents are kept apart.

    Returns:
        A dictionary of int32 [S]: input_ids; labels, the token that follows each, IGNORE_INDEX where that
        is of another document or there is none; segment_ids, 0 for the first document in the window, 1 for
        the next, padding counting as one; position_ids, from 0 in each document, and from 0 at the window's
        start in a document that began before it.

    Raises:
        ValueError: an id that is not below `vocab_size`.
    """
    start = number * sequence_length
    stop = min(start + sequence_length + 1, len(tokens))
    ids = np.zeros(sequence_length + 1, np.int32)
    ids[: stop - start] = read_tokens(tokens, start, stop, vocab_size)
    begins = np.zeros(sequence_length + 1, np.int32)
    ends = document_ends(tokens, start, stop) - start
    begins[ends[ends <= sequence_length]] = 1  # where one document ends, the next or padding begins
    segments = np.cumsum(begins, dtype=np.int32)
    labels = np.where(segments[1:] == segments[:-1], ids[1:], np.int32(IGNORE_INDEX))
    labels[stop - start - 1 :] = IGNORE_INDEX
    places = np.arange(sequence_length, dtype=np.int32)
    return {
        "input_ids": ids[:-1],
        "labels": labels,
        "segment_ids": segments[:-1],
        "position_ids": places - np.maximum.accumulate(np.where(begins[:-1], places, 0)),
    }


@dataclass(frozen=True)
class _Windows:
    """One source's windows, as Grain wants a source: its length and its elements."""

    tokens: Tokens
    sequence_length: int
    vocab_size: int

    def __len__(self) -> int:
        # a last token that is only a label needs no window of its own
        return max(1, -(-(len(self.tokens) - 1) // self.sequence_length))

    def __getitem__(self, number: int) -> Window:
        return window(self.tokens, number, self.sequence_length, self.vocab_size)


def _closing(dataset: grain.IterDataset[Window]) -> Generator[Window, None, None]:
    """The elements; whoever stops reading stops the thread."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _nothing(like: Window) -> Window:
    """A window of padding."""
    length = len(like["labels"])
    return {
        "input_ids": np.zeros(length, np.int32),
        "labels": np.full(length, IGNORE_INDEX, np.int32),
        "segment_ids": np.zeros(length, np.int32),
        "position_ids": np.arange(length, dtype=np.int32),
    }
