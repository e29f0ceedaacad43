"""The ranked list of what may have caused a step to be as it is."""

import math
from collections.abc import Iterator, Sequence

from train.autopsy.cause import Cause
from train.autopsy.document_causes import blamed_documents
from train.autopsy.history import RECENT, History
from train.autopsy.layer_causes import layers_out_of_line
from train.autopsy.layers import dead_halves
from train.autopsy.noise import UNUSUAL, Comparison
from train.autopsy.non_finite_causes import not_finite
from train.autopsy.rates import Jump, jumps
from train.autopsy.record import Recorded
from train.autopsy.replay import Replay
from train.autopsy.state_causes import changed_checkpoints, dead_layers, wrong_moments
from train.autopsy.symptoms import Symptom, symptoms_of


def find_causes(
    replay: Replay,
    history: History,
    recorded: Recorded,
    symptoms: Sequence[Symptom],
    comparisons: Sequence[Comparison | None],
    length: int,
) -> list[Cause]:
    """The causes, what acts first before what acts later, and what may be a result after all of them.

    What a step starts from (its state, its rate, its documents) can be the cause of its loss, gradients and
    update, and those only of what comes later.

    Args:
        comparisons: of `compare_losses`, for the pieces of the step in question.
        length: as in `symptoms_of`.
    """
    step = history.steps[-1].step
    dead = dead_halves([(one.step, one.statistics) for one in history.steps])
    causes = [
        *not_finite(replay, history, recorded),
        *dead_layers(dead),
        *map(_jump, jumps(replay.rates, max(step - RECENT, 1), step)),
        *wrong_moments(replay, history, dead),
        *changed_checkpoints(history),
        *_weight_decay(recorded, step),
        *blamed_documents(replay, history, recorded, symptoms, comparisons),
        *_unlike(history, symptoms),
    ]
    if any(symptom.unusual for symptom in symptoms):
        causes += layers_out_of_line(history)
        causes += _earlier(replay, history, length)
    first = min((cause.since for cause in causes if not cause.result), default=step)
    # parameters that are out of line already make some documents worse than others
    causes = [
        cause._replace(result=True) if cause.kind == "document" and first < step else cause
        for cause in causes
    ]
    return sorted(causes, key=lambda cause: (cause.result, cause.since, -cause.surprise))


def _jump(jump: Jump) -> Cause:
    return Cause(
        "learning rate",
        f"the learning rate jumped in step {jump.step}",
        jump.step,
        math.inf,
        [
            f"{jump.rate:.4g} after {jump.before:.4g}: {jump.rate / jump.before:.3g} times as much",
            f"before, it grew by at most {jump.usual:.3g} in a step",
        ],
        detail=jump,
    )


def _weight_decay(recorded: Recorded, step: int) -> Iterator[Cause]:
    terms = recorded.terms
    if terms.decay > 10 * terms.direction:
        yield Cause(
            "weight decay",
            "weight decay outweighs the gradients",
            step,
            terms.decay / max(terms.direction, 1e-300),
            [
                f"norm of the update by weight decay {terms.decay:.3g}, by gradients {terms.direction:.3g}"
            ],
        )


def _unlike(history: History, symptoms: Sequence[Symptom]) -> Iterator[Cause]:
    """A replay that leaves the recorded losses by more than their noise."""
    loss = symptoms[0].comparison
    if loss is None:
        return
    for step, (replayed, recorded) in history.unlike.items():
        apart = abs(replayed - recorded) / loss.spread
        if not apart < UNUSUAL:
            yield Cause(
                "replay",
                f"the replay leaves the run in step {step}: something acted that is not in its folder",
                step,
                apart,
                [
                    f"replayed loss {replayed:.6g}, recorded {recorded:.6g}: {apart:.1f} spreads of the "
                    "loss apart"
                ],
                result=True,
            )
            return


def _earlier(replay: Replay, history: History, length: int) -> Iterator[Cause]:
    """The first of the recent steps that was unusual."""
    step = history.steps[-1].step
    for one in history.steps[:-1]:
        if one.step <= step - RECENT:
            continue
        unusual = [s for s in symptoms_of(replay, history, one.step, length) if s.unusual]
        if unusual:
            yield Cause(
                "earlier step",
                f"step {one.step} was unusual already: see `python -m train autopsy {replay.folder} "
                f"{one.step}`",
                one.step,
                max(s.comparison.surprise if s.comparison else math.inf for s in unusual),
                [in_words(symptom) for symptom in unusual],
                result=True,
            )
            return


def in_words(symptom: Symptom) -> str:
    """A symptom with what was to be expected."""
    comparison = symptom.comparison
    if comparison is None:
        return f"{symptom.name} {symptom.value:.4g}; too few steps before it to tell whether that is usual"
    expected = comparison.expected if symptom.name == "loss" else math.exp(comparison.expected)
    return (
        f"{symptom.name} {symptom.value:.4g}, by the steps before {expected:.4g}: "
        f"{comparison.surprise:.1f} spreads above"
    )
