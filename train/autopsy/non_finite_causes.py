"""Why a step, or the state that it leaves, is not finite."""

import math
from collections.abc import Iterator

from train.autopsy.cause import Cause
from train.autopsy.history import History
from train.autopsy.non_finite import Broken, backward_place, forward_places, parts_in_words
from train.autopsy.record import Recorded
from train.autopsy.replay import Replay

_SHOWN = 5


def not_finite(replay: Replay, history: History, recorded: Recorded) -> Iterator[Cause]:
    """The cause of numbers that are not finite; nothing where all are."""
    now, broken = history.steps[-1], history.broken
    finite = math.isfinite(now.loss) and math.isfinite(now.grad_norm)
    if broken is not None and broken.done < now.step:
        yield _state(replay, broken)
    elif not finite:
        yield _step(replay, history, recorded)
    elif broken is not None:
        yield _cause(
            f"the update of step {now.step} is not finite: {next(parts_in_words(broken.parts))}",
            now.step,
            [
                *_shown(broken)[1:],
                f"loss {now.loss:.6g} and gradient norm {now.grad_norm:.4g} are finite",
                *_largest_gradient(history),
            ],
        )


def _state(replay: Replay, broken: Broken) -> Cause:
    """Of a state from which the step, or one before it, began."""
    if not broken.saved:
        return _cause(
            f"step {broken.done} left a state that is not finite: see `python -m train autopsy "
            f"{replay.folder} {broken.done}`",
            broken.done,
            _shown(broken),
        )
    source = "the first weights" if broken.done == 0 else f"the checkpoint of step {broken.done}"
    return _cause(
        f"not finite in {source}: {next(parts_in_words(broken.parts))}",
        broken.done + 1,
        _shown(broken)[1:],
    )


def _step(replay: Replay, history: History, recorded: Recorded) -> Cause:
    """Of a step that began with finite numbers."""
    now = history.steps[-1]
    places = forward_places(replay, history.states[now.step - 1][0], history.windows)
    dtype = replay.options.model.compute_dtype or replay.options.model.parameter_dtype
    evidence = []
    first = next((index for index, place in enumerate(places) if place.tokens.any()), None)
    pieces = []
    if first is not None:
        place = places[first]
        name = f"{place.name} is not finite in {dtype}"
        pieces = [
            piece.piece
            for piece in now.pieces
            if place.tokens[piece.piece.row][
                history.windows["segment_ids"][piece.piece.row] == piece.piece.segment
            ].any()
        ]
        evidence.append(
            f"in {place.tokens.sum():,} of {place.tokens.size:,} tokens, of {len(pieces)} of "
            f"{len(now.pieces)} documents; what comes before it in the forward pass is finite"
        )
    else:
        gradient = backward_place(now.statistics.norms)
        name = (
            f"the norm of the gradient of {gradient} is not finite in {dtype}"
            if gradient is not None
            else f"the norm of all gradients is not finite in {dtype}"
        )
        evidence.append(
            "the forward pass is finite, and so are the gradients before it in the backward pass"
        )
        evidence += _largest_gradient(history)
    residual = places[:first][: 1 + 2 * replay.config.num_hidden_layers : 2]
    if residual:
        reached = ", ".join(f"{place.largest:.3g}" for place in residual)
        evidence.append(f"largest numbers in the embedding and after each layer: {reached}")
    if math.isfinite(recorded.loss) and math.isfinite(recorded.grad_norm):
        evidence.append(
            f"in {recorded.dtype} all is finite, loss {recorded.loss:.6g} and gradient norm "
            f"{recorded.grad_norm:.4g}: numbers are too large for {dtype}"
        )
    if 0 < len(pieces) < len(now.pieces):
        name += f", in {len(pieces)} of {len(now.pieces)} documents"
    else:
        pieces = []
    return _cause(name, now.step, evidence)._replace(pieces=pieces)


def _largest_gradient(history: History) -> Iterator[str]:
    """Of the gradients whose norm is finite."""
    norms = [
        (float(value), name)
        for name, group in history.steps[-1].statistics.norms.items()
        for value in group.gradient.reshape(-1)
        if math.isfinite(value)
    ]
    if norms:
        value, name = max(norms)
        yield f"the largest finite norm of a gradient is {value:.3g}, of {name}"


def _shown(broken: Broken) -> list[str]:
    lines = list(parts_in_words(broken.parts))
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def _cause(name: str, since: int, evidence: list[str]) -> Cause:
    return Cause("not finite", name, since, math.inf, evidence)
