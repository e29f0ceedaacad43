"""What was found out about a step, as lines of text."""

from collections.abc import Iterator

from llama_jax.formatting import printable
from train.autopsy.causes import in_words
from train.autopsy.result import Autopsy

_DOCUMENTS = 5  # in the text; the page and the JSON have all
_TEXT = 60


def lines_of(autopsy: Autopsy) -> Iterator[str]:
    """The conclusions first, then the numbers behind them."""
    yield from conclusions(autopsy)
    yield ""
    yield replayed(autopsy)
    yield from (in_words(symptom) for symptom in autopsy.symptoms)
    recorded, terms = autopsy.recorded, autopsy.recorded.terms
    yield (
        f"recorded in {recorded.dtype}: loss {recorded.loss:.6f} over {recorded.num_tokens:,} labels, "
        f"gradient norm {recorded.grad_norm:.4g}"
    )
    yield (
        f"update: norm {terms.update:.4g}, by gradients {terms.direction:.4g}, by weight decay "
        f"{terms.decay:.4g}; learning rate {terms.learning_rate:.4g}; clipping scaled the gradient by "
        f"{terms.clip:.3g}"
    )
    yield ""
    yield f"documents, of {len(recorded.contributions)} those with the largest part of the gradient:"
    for row in document_rows(autopsy)[:_DOCUMENTS]:
        yield "  " + "  ".join(row)
    if autopsy.outcomes:
        yield ""
        yield f"what would have happened, loss of step {autopsy.step} and those after it:"
    for outcome in autopsy.outcomes:
        losses = " ".join("   nan" if loss is None else f"{loss:.4f}" for loss in outcome.losses)
        yield f"  {losses}  {printable(outcome.name)}"


def conclusions(autopsy: Autopsy) -> Iterator[str]:
    """Whether the step is unusual, and the causes in order."""
    unusual = [symptom.name for symptom in autopsy.symptoms if symptom.unusual]
    if not autopsy.causes:
        if unusual:
            yield f"step {autopsy.step}: unusual ({', '.join(unusual)}), and nothing found that explains it"
        else:
            yield f"step {autopsy.step}: nothing unusual"
        return
    symptoms = f"unusual {', '.join(unusual)}; " if unusual else ""
    yield f"step {autopsy.step}: {symptoms}likely causes, first to last:"
    for number, cause in enumerate(autopsy.causes, start=1):
        result = " (may be a result of what is above)" if cause.result and number > 1 else ""
        yield f"{number}. {printable(cause.name)}{result}"
        yield from (f"   {printable(line)}" for line in cause.evidence)


def replayed(autopsy: Autopsy) -> str:
    """From where, and whether it was the same."""
    history = autopsy.history
    text = f"replayed from step {history.start}: "
    if not history.compared:
        return text + "none of the replayed steps is in metrics.jsonl"
    if not history.unlike:
        return text + f"the losses of {history.compared} steps are the recorded ones, bit for bit"
    first = next(iter(history.unlike))
    here, there = history.unlike[first]
    largest = max(abs(a - b) for a, b in history.unlike.values())
    return text + (
        f"{len(history.unlike)} of {history.compared} losses differ from the recorded ones, by up to "
        f"{largest:.3g}; the first in step {first}, {here:.9g} instead of {there:.9g}"
    )


def document_rows(autopsy: Autopsy) -> list[tuple[str, ...]]:
    """Every piece of a document, the largest part of the gradient first."""
    pieces = autopsy.history.steps[-1].pieces
    whole = autopsy.recorded.grad_norm or 1.0
    order = sorted(
        range(len(pieces)), key=lambda index: -autopsy.recorded.contributions[index].norm
    )
    rows: list[tuple[str, ...]] = []
    for index in order:
        piece, one = pieces[index].piece, autopsy.recorded.contributions[index]
        comparison, text = autopsy.comparisons[index], autopsy.texts[index]
        rows.append(
            (
                f"row {piece.row}",
                f"{piece.tokens[0]:,}-{piece.tokens[1]:,}",
                f"{piece.labels} labels",
                f"loss {one.loss:.3f}",
                "" if comparison is None else f"{comparison.surprise:+.1f} spreads",
                f"gradient {one.norm:.3g}",
                f"cosine {one.cosine:+.2f}",
                f"norm without it {one.norm_without / whole:.3f}x",
                repr(text[:_TEXT]),
            )
        )
    return rows
