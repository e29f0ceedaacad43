"""Where the rows of a training batch come from: source, window, tokens and documents."""

from collections.abc import Sequence
from typing import Any

from train.data.tokens import Source, document_ends
from train.data.windows import window_numbers


def batch_rows(
    sources: Sequence[Source], step: int, *, batch_size: int, sequence_length: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of the batch of `step`, which counts from 1, in the order of the batch.

    Returns:
        For each row a dictionary of JSON values: source, its path; window, its number in the source's
        training split; tokens, the first position in the split that is in the row, and the one after its
        last; document_ends, the positions after the first up to the last at which a document ends.

    Raises:
        ValueError: as `Source.open`.
    """
    order = window_numbers(sources, sequence_length=sequence_length, seed=seed)
    splits = [source.open("train") for source in sources]

    def describe(source: int, window: int) -> dict[str, Any]:
        start = window * sequence_length
        stop = min(start + sequence_length, len(splits[source]))
        return {
            "source": str(sources[source].path),
            "window": window,
            "tokens": [start, stop],
            "document_ends": document_ends(splits[source], start, stop).tolist(),
        }

    first = (step - 1) * batch_size
    return [describe(*map(int, order[number])) for number in range(first, first + batch_size)]
