"""Documents of the batch that may have caused a step to be as it is."""

import math
from collections.abc import Iterator, Sequence

from train.autopsy.cause import Cause
from train.autopsy.documents import Piece, compare_gradients
from train.autopsy.history import History
from train.autopsy.noise import UNUSUAL, Comparison
from train.autopsy.record import Recorded
from train.autopsy.replay import Replay
from train.autopsy.symptoms import Symptom

# the loss of a document and its part of the gradient are unusual together from here on
_BOTH = UNUSUAL / 2
# A document must move the loss, or the gradient's norm, of the step by this many times the usual noise;
# less is enough where its loss and its gradient are unusual together.
_RELEVANT, _RELEVANT_BOTH = 2.0, 0.5


def blamed_documents(
    replay: Replay,
    history: History,
    recorded: Recorded,
    symptoms: Sequence[Symptom],
    comparisons: Sequence[Comparison | None],
) -> Iterator[Cause]:
    """Documents whose loss is out of line and that matter to the step, or that make it unusual."""
    now = history.steps[-1]
    loss, norm, _ = symptoms
    gradients = compare_gradients(now.pieces, [one.norm for one in recorded.contributions])
    by_document: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(now.pieces):
        by_document.setdefault(piece.piece.document, []).append(index)
    for indices in by_document.values():
        pieces = [now.pieces[index].piece for index in indices]
        loudest = max(indices, key=lambda index: recorded.contributions[index].norm)
        contribution, comparison = recorded.contributions[loudest], comparisons[loudest]
        by_loss = 0.0 if comparison is None else comparison.surprise
        part = gradients[loudest]
        by_gradient = 0.0 if part is None else part.surprise
        shift = recorded.loss - contribution.loss_without
        moved = 0.0 if loss.comparison is None else shift / loss.comparison.spread
        removed = 0.0
        if norm.comparison is not None and contribution.norm_without > 0:
            factor = recorded.grad_norm / contribution.norm_without
            removed = math.log(factor) / norm.comparison.spread if factor > 0 else 0.0
        relevance = max(moved, removed)
        surprising = (by_loss >= UNUSUAL and relevance >= _RELEVANT) or (
            min(by_loss, by_gradient) >= _BOTH and relevance >= _RELEVANT_BOTH
        )
        explains = _explains(loss, contribution.loss_without) or _explains(
            norm, contribution.norm_without, logarithm=True
        )
        if not surprising and not explains:
            continue
        evidence = [
            f"loss {contribution.loss:.3f} per token over {now.pieces[loudest].piece.labels} tokens; "
            f"that of the batch without it is {contribution.loss_without:.3f}, with it "
            f"{recorded.loss:.3f}",
            f"norm of its part of the gradient {contribution.norm:.3g}, cosine with the rest "
            f"{contribution.cosine:.2f}; the gradient's norm is {recorded.grad_norm:.3g}, without it "
            f"{contribution.norm_without:.3g}",
        ]
        if comparison is not None:
            evidence.append(
                f"its loss is {by_loss:.1f} spreads above that of other documents in steps before"
            )
        if part is not None:
            evidence.append(
                f"its part of the gradient is {by_gradient:.1f} spreads above those of others in the batch"
            )
        yield Cause(
            "document",
            f"document in row {pieces[0].row}, {_place(replay, pieces[0])}",
            now.step,
            max(by_loss, by_gradient, moved, removed),
            evidence,
            pieces=pieces,
        )


def _explains(symptom: Symptom, value_without: float, *, logarithm: bool = False) -> bool:
    """Whether a symptom is unusual, and not half as far out of line without the document."""
    comparison = symptom.comparison
    if comparison is None or not symptom.unusual:
        return False
    if not value_without > 0:
        return False
    value = math.log(value_without) if logarithm else value_without
    surprise = (value - comparison.expected) / comparison.spread
    return surprise < min(comparison.surprise / 2, UNUSUAL)


def _place(replay: Replay, piece: Piece) -> str:
    source = replay.sources[piece.source].path
    return f"tokens {piece.tokens[0]:,} to {piece.tokens[1]:,} of {source}"
