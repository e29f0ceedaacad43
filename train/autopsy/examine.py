"""Examine one step of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.formatting import printable
from llama_jax.text.companions import RUN_TOKENIZER
from llama_jax.text.tokenizer import load_tokenizer
from train.autopsy.cause import Cause
from train.autopsy.causes import find_causes
from train.autopsy.counterfactuals import Change, outcomes
from train.autopsy.documents import compare_losses
from train.autopsy.history import RECENT, Changed, History, replay_history
from train.autopsy.moments import repaired
from train.autopsy.record import Recorded, record_step, recording_dtype
from train.autopsy.replay import Replay
from train.autopsy.result import Autopsy
from train.autopsy.symptoms import symptoms_of
from train.data.tokens import read_tokens
from train.program.optimizer import DIRECTIONS

_SHOWN_TOKENS = 24  # of a document
_SMALLER = 0.1


def examine(
    replay: Replay,
    step: int,
    *,
    start: int,
    length: int,
    horizon: int,
    beta2: float | None,
    tell: Callable[[str], None],
) -> Autopsy:
    """Replay from the state after `start` steps, and find out about `step`.

    Args:
        length: steps before `step` that tell what is usual.
        horizon: steps after it to which counterfactuals are replayed; 0 for none of them.
        beta2: for the counterfactual; None for 0.99, or 0.95 if the run's is at least that.
        tell: called with what is being done.

    Raises:
        ValueError: a checkpoint that is damaged.
    """
    history = replay_history(
        replay, start, step, length, lambda done: tell(f"replaying: step {done} of {step}")
    )
    now = history.steps[-1]
    dtype = recording_dtype(replay)
    tell(f"recording step {step} in {dtype}: {len(now.pieces)} documents")
    recorded = record_step(
        replay, step, history.states[step - 1], history.windows, now.pieces, dtype
    )
    symptoms = symptoms_of(replay, history, step, length)
    comparisons = compare_losses(now.pieces, [one.pieces for one in history.steps[:-1]])
    causes = find_causes(replay, history, recorded, symptoms, comparisons, length)
    changes = list(_changes(replay, step, history, recorded, causes, beta2))
    found = outcomes(
        replay,
        step,
        horizon,
        changes if horizon else [],
        lambda name: tell(f"replaying otherwise: {name}"),
    )
    return Autopsy(
        replay,
        step,
        history,
        recorded,
        symptoms,
        causes,
        comparisons,
        _texts(replay, history),
        list(found),
    )


def _changes(
    replay: Replay,
    step: int,
    history: History,
    recorded: Recorded,
    causes: list[Cause],
    beta2: float | None,
) -> Iterator[Change]:
    """What is replayed otherwise: nothing, each cause undone, and what could be tried in any case."""
    before = step - 1, history.states[step - 1]
    earliest = min(history.states)
    yield Change("as it was", before)
    documents = [cause for cause in causes if cause.pieces]
    for cause in documents[:3]:
        what = (
            f"the {cause.name}" if cause.kind == "document" else "the documents that are not finite"
        )
        yield Change(f"without {what}", before, pieces=cause.pieces)
    if not documents and recorded.contributions:
        loudest = int(np.argmax([one.norm for one in recorded.contributions]))
        pieces = history.steps[-1].pieces
        same = [p.piece for p in pieces if p.piece.document == pieces[loudest].piece.document]
        row = pieces[loudest].piece.row
        yield Change(
            f"without the document of the largest gradient, in row {row}", before, pieces=same
        )
    for cause in causes:
        yield from _undone(replay, step, history, cause, earliest)
    yield Change(f"the step {_SMALLER:g} times as large", before, scales=[(step, _SMALLER)])
    if "beta2" in DIRECTIONS[replay.options.optimizer.name].uses:
        other = beta2 if beta2 is not None else _other(replay.options.optimizer.beta2)
        yield Change(f"beta2 {other:g}", before, beta2=other)
    limits = _usual_norms(history, recorded.groups)
    if limits is not None:
        yield Change(
            "gradients clipped by layer, to the median of the steps before", before, limits=limits
        )


def _undone(
    replay: Replay, step: int, history: History, cause: Cause, earliest: int
) -> Iterator[Change]:
    """The replay without a cause, if it began in the recent steps."""
    if cause.since <= earliest:
        return
    if cause.kind == "learning rate":
        before, rates = cause.detail.before, replay.rates
        scales = [
            (number, min(before / float(rates[number - 1]), 1.0))
            for number in range(cause.since, len(rates) + 1)
            if rates[number - 1] > 0
        ]
        state = earliest, history.states[earliest]
        yield Change(f"the learning rate as before step {cause.since}", state, scales=scales)
    elif isinstance(cause.detail, Changed):
        if cause.detail.replayed is not None:
            state = cause.detail.step, cause.detail.replayed
            yield Change(
                f"step {cause.since} from the replayed state instead of the checkpoint", state
            )
    elif cause.kind == "second moment":
        done, findings = cause.detail
        if done not in history.states:
            return
        after = [one for one in history.steps if done < one.step <= done + RECENT]
        sizes = {name: group.size for name, group in history.moments[done].items()}
        typical = {
            name: np.mean(
                [np.square(one.statistics.norms[name].gradient) / sizes[name] for one in after],
                axis=0,
            )
            for name in sizes
        }
        params, opt_state = history.states[done]
        state = done, (params, repaired(opt_state, findings, typical))
        yield Change("second moments as the gradients would have left them", state)


def _other(beta2: float) -> float:
    return 0.99 if beta2 < 0.99 else 0.95


def _usual_norms(history: History, groups: list[str]) -> np.ndarray | None:
    """The median norm of the gradient of each group over the steps before; None if there are none."""
    rows = []
    for one in history.steps[:-1]:
        norms = one.statistics.norms
        stacked = [np.square(v.gradient) for v in norms.values() if np.ndim(v.gradient)]
        layers = np.sqrt(np.sum(stacked, axis=0))
        rest = [float(v.gradient) for v in norms.values() if not np.ndim(v.gradient)]
        rows.append(np.array([*layers, *rest]))
    if not rows:
        return None
    assert len(rows[0]) == len(groups)
    return np.median(rows, axis=0)


def _texts(replay: Replay, history: History) -> list[str]:
    """How each piece begins."""
    tokenizer = load_tokenizer(Path(replay.folder) / RUN_TOKENIZER)
    splits = [source.open("train") for source in replay.sources]
    texts = []
    for loss in history.steps[-1].pieces:
        first, last = loss.piece.tokens
        last = min(last, first + _SHOWN_TOKENS)
        ids: Any = read_tokens(splits[loss.piece.source], first, last, replay.config.vocab_size)
        texts.append(printable(tokenizer.decode(ids.tolist(), skip_special_tokens=False)))
    return texts
