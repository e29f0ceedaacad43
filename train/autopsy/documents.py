"""The documents of a batch: where they are in the data, and the loss that they have in it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.loss import IGNORE_INDEX
from train.autopsy.noise import Comparison, compare
from train.autopsy.replay import Replay
from train.data.tokens import Tokens, document_ends
from train.data.windows import Window, window_numbers

_BLOCK = 1 << 16  # tokens that are searched for the end of a document at a time


class Piece(NamedTuple):
    """What one row of a batch has of one document.

    source: the number of the source. window: of the source's training split.
    tokens: first position in the split, and the one after the last.
    end: where the document ends in the split, by which it is known in other rows.
    labels: tokens of it that are in the loss.
    """

    row: int
    segment: int
    source: int
    window: int
    tokens: tuple[int, int]
    end: int
    labels: int

    @property
    def document(self) -> tuple[int, int]:
        """The same for all pieces of one document."""
        return self.source, self.end


class PieceLoss(NamedTuple):
    """The loss of a piece: sums over its labels of the loss and of its square."""

    piece: Piece
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """Per label."""
        return self.total / self.piece.labels


def pieces_of(replay: Replay, step: int, windows: Window) -> list[Piece]:
    """The pieces with at least one label in the batch of a step, which counts from 1."""
    options = replay.options
    length = options.sequence_length
    order = window_numbers(replay.sources, sequence_length=length, seed=options.seed)
    splits = [source.open("train") for source in replay.sources]
    pieces = []
    for row, (segments, labels) in enumerate(
        zip(windows["segment_ids"], windows["labels"], strict=True)
    ):
        source, window = map(int, order[(step - 1) * options.batch_size + row])
        start = window * length
        for segment in range(int(segments[-1]) + 1):
            (places,) = np.nonzero(segments == segment)
            count = int((labels[places] != IGNORE_INDEX).sum())
            if not count:
                continue
            first, last = start + int(places[0]), start + int(places[-1]) + 1
            end = _end(splits[source], last - 1)
            pieces.append(Piece(row, segment, source, window, (first, last), end, count))
    return pieces


def piece_losses(
    pieces: Sequence[Piece], windows: Window, token_losses: np.ndarray
) -> list[PieceLoss]:
    """The losses of the pieces, from those of the tokens [rows, seq]."""
    losses = []
    for piece in pieces:
        mask = labels_of(piece, windows)
        values = token_losses[piece.row][mask].astype(np.float64)
        losses.append(PieceLoss(piece, float(values.sum()), float(np.square(values).sum())))
    return losses


def labels_of(piece: Piece, windows: Window) -> np.ndarray:
    """Which tokens of the piece's row are labels of the piece: [seq] bool."""
    in_loss = windows["labels"][piece.row] != IGNORE_INDEX
    return (windows["segment_ids"][piece.row] == piece.segment) & in_loss


def without(windows: Window, pieces: Sequence[Piece]) -> Window:
    """The batch without these pieces."""
    out = np.zeros(windows["labels"].shape, bool)
    for piece in pieces:
        out[piece.row] |= windows["segment_ids"][piece.row] == piece.segment
    return _left_out(windows, out)


def only(windows: Window, piece: Piece) -> Window:
    """The batch with this piece alone."""
    out = np.ones(windows["labels"].shape, bool)
    out[piece.row] = windows["segment_ids"][piece.row] != piece.segment
    return _left_out(windows, out)


def _left_out(windows: Window, out: np.ndarray) -> Window:
    """The batch without the tokens `out` [rows, seq], which become another token that is not in the loss.

    To leave them out of the loss is not enough: where they lead to numbers that are not finite, these times
    zero are not zero.
    """
    others = windows["input_ids"][~out]
    ids = np.where(out, others[0], windows["input_ids"]) if len(others) else windows["input_ids"]
    labels = np.where(out, IGNORE_INDEX, windows["labels"])
    return {**windows, "input_ids": ids.astype(np.int32), "labels": labels.astype(np.int32)}


def compare_losses(
    losses: Sequence[PieceLoss], earlier: Sequence[Sequence[PieceLoss]]
) -> list[Comparison | None]:
    """How far each piece's loss is above that of the rest of its batch, beside earlier steps' pieces.

    The loss per token of a short piece varies more, so the difference is divided by its standard deviation,
    sqrt(between + within / labels), with variances between documents and within them from the earlier
    steps. A piece is not compared with others of its document, nor with those of less than half as many
    labels.

    Args:
        losses: of the batch in question.
        earlier: of the steps before it, each by the parameters that the step began with.
    """
    reference = [pair for step in earlier for pair in _differences(step)]
    if not reference:
        return [None] * len(losses)
    labels = np.array([piece.piece.labels for piece, _ in reference], float)
    differences = np.array([difference for _, difference in reference])
    sums = np.array([[piece.total, piece.squares] for piece, _ in reference]).sum(0)
    # pooled over the pieces: squares around each piece's own mean
    around = sums[1] - sum(piece.total**2 / piece.piece.labels for piece, _ in reference)
    within = max(around / max(labels.sum() - len(labels), 1.0), 1e-12)
    between = max(float(np.mean(np.square(differences) - within / labels)), 0.0)

    def score(piece: PieceLoss, difference: float) -> float:
        return difference / math.sqrt(between + within / piece.piece.labels)

    known = [(piece.piece, score(piece, d)) for piece, d in reference]
    comparisons = []
    for piece, difference in _differences(losses):
        others = [
            value
            for other, value in known
            if other.document != piece.piece.document and 2 * other.labels >= piece.piece.labels
        ]
        comparisons.append(compare(score(piece, difference), others, floor=0.5))
    return comparisons


def compare_gradients(
    pieces: Sequence[PieceLoss], norms: Sequence[float]
) -> list[Comparison | None]:
    """How far each piece's part of the gradient is above those of other documents in the batch.

    Norms are divided by the square root of the labels, as gradients of unrelated tokens add up, and
    compared as logarithms.
    """
    logs = [
        math.log(max(norm, 1e-300) / math.sqrt(piece.piece.labels))
        for piece, norm in zip(pieces, norms, strict=True)
    ]
    comparisons = []
    for piece, log in zip(pieces, logs, strict=True):
        others = [
            value
            for other, value in zip(pieces, logs, strict=True)
            if other.piece.document != piece.piece.document
        ]
        comparisons.append(compare(log, others, floor=0.1))
    return comparisons


def _differences(losses: Sequence[PieceLoss]) -> Iterator[tuple[PieceLoss, float]]:
    """Each piece with its loss per token minus that of the batch's other documents."""
    for piece in losses:
        others = [other for other in losses if other.piece.document != piece.piece.document]
        count = sum(other.piece.labels for other in others)
        if count:
            rest = sum(other.total for other in others) / count
            yield piece, piece.mean - rest
        else:
            yield piece, 0.0


def describe(replay: Replay, piece: Piece) -> dict[str, Any]:
    """Where the piece is, as JSON values."""
    return {
        "row": piece.row,
        "source": str(replay.sources[piece.source].path),
        "window": piece.window,
        "tokens": list(piece.tokens),
        "document_end": piece.end,
    }


def _end(tokens: Tokens, position: int) -> int:
    """Where the document ends that has the token at `position`."""
    start, size = position, _BLOCK
    while start < len(tokens):
        stop = min(start + size, len(tokens))
        if len(ends := document_ends(tokens, start, stop)):
            return int(ends[0])
        start, size = stop, 2 * size
    return len(tokens)
