"""The ranked list of what may have caused a step to be as it is."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.autopsy.documents import Piece, compare_gradients
from train.autopsy.history import RECENT, Changed, History
from train.autopsy.layers import Dead, dead_halves
from train.autopsy.moments import Finding, out_of_line
from train.autopsy.noise import UNUSUAL, Comparison, compare
from train.autopsy.rates import Jump, jumps
from train.autopsy.record import Recorded
from train.autopsy.replay import Replay
from train.autopsy.symptoms import Symptom, symptoms_of

# the loss of a document and its part of the gradient are unusual together from here on
_BOTH = UNUSUAL / 2
# a document must move the loss, or the gradient's norm, of the step by this many times the usual noise
_RELEVANT = 2.0
# where a replay differs from the run by rounding, a part of a checkpoint must differ this many times more
# than most parts do
_DIFFERENT = 100.0
# a layer is out of line on its own if its surprise is this many times that of most other layers
_ALONE = 2.0


class Cause(NamedTuple):
    """One entry of the list.

    kind: "document", "learning rate", "second moment", "layer", "checkpoint", "weight decay", "replay" or
        "earlier step".
    since: the step from which on it acts.
    surprise: in units of the run's own noise; infinite for what the run's own rules exclude.
    result: whether it may as well follow from something before it.
    detail: what it is about, for counterfactuals. pieces: of the document that it is.
    """

    kind: str
    name: str
    since: int
    surprise: float
    evidence: list[str]
    result: bool = False
    detail: Any = None
    pieces: Sequence[Piece] = ()


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
        *_dead_layers(dead),
        *map(_jump, jumps(replay.rates, max(step - RECENT, 1), step)),
        *_moments(replay, history, dead),
        *_checkpoints(history),
        *_weight_decay(recorded, step),
        *_documents(replay, history, recorded, symptoms, comparisons),
        *_unlike(history, symptoms),
    ]
    if any(symptom.unusual for symptom in symptoms):
        causes += _layers(history, recorded)
        causes += _earlier(replay, history, length)
    return sorted(causes, key=lambda cause: (cause.result, cause.since, -cause.surprise))


def _dead_layers(dead: Sequence[Dead]) -> Iterator[Cause]:
    """One cause for each layer."""
    for layer in sorted({half.layer for half in dead}):
        halves = [half for half in dead if half.layer == layer]
        names = " and ".join(half.half for half in halves)
        evidence = [f"{half.half}: {reason}" for half in halves for reason in half.reasons]
        since = min(half.since for half in halves)
        yield Cause("layer", f"layer {layer}: {names} dead", since, math.inf, evidence)


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


def _moments(replay: Replay, history: History, dead: Sequence[Dead]) -> Iterator[Cause]:
    """Second moments out of line with gradients, in each state that was looked at."""
    options = replay.options.optimizer
    named: set[tuple[str, int | None]] = set()
    modules = {(half.layer, {"attention": "self_attn", "MLP": "mlp"}[half.half]) for half in dead}
    for done, moments in sorted(history.moments.items()):
        if not moments:
            continue
        after = [one for one in history.steps if done < one.step <= done + RECENT]
        gradients = []
        for one in after:
            factor = clip_factor(one.grad_norm, options.clip_norm)
            gradients.append(
                {name: norms.gradient * factor for name, norms in one.statistics.norms.items()}
            )
        ignored: set[tuple[str, int | None]] = {
            (name, layer)
            for name in moments
            for layer, module in modules
            if f".{module}." in name or "layernorm" in name
        }
        findings = out_of_line(moments, gradients, _recorded_norms(replay, done), options, ignored)
        findings = [finding for finding in findings if finding[:2] not in named]
        named |= {finding[:2] for finding in findings}
        if findings:
            yield Cause(
                "second moment",
                f"the second moment of {_parameters(findings)} does not fit its gradients",
                done + 1,
                max(finding.surprise for finding in findings),
                [
                    f"before step {done + 1}, {_parameter(finding)}: {finding.reason}"
                    for finding in findings
                ],
                detail=(done, findings),
            )


def _recorded_norms(replay: Replay, done: int) -> list[float] | None:
    """The gradient's norm after clipping in all steps up to `done`; None unless all are recorded."""
    clip = replay.options.optimizer.clip_norm
    norms = []
    for number in range(1, done + 1):
        line = replay.recorded.get(number)
        if line is None:
            return None
        norm = line["grad_norm"] or 0.0  # null if it was not finite: such a step is left out
        norms.append(norm * clip_factor(norm, clip))
    return norms


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """By which clipping scales a gradient of that norm."""
    return 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm


def _checkpoints(history: History) -> Iterator[Cause]:
    """Checkpoints that are not what the steps before them lead to."""
    for changed in history.changed:
        values = np.array(list(changed.differences.values()))
        usual = float(np.median(values))
        # on another machine all parts differ by rounding, the more the longer the replay
        least = 0.01 if changed.exact else max(0.01, _DIFFERENT * usual)
        apart = {key: value for key, value in changed.differences.items() if value > least}
        if not apart:
            continue
        ordered = sorted(apart, key=lambda key: -apart[key])
        kind = _kind(changed, ordered)
        evidence = [
            f"{_part(key)}: the saved norm is {changed.shrunk[key]:.3g} times the replayed one, and they "
            f"differ by {apart[key]:.3g} of the larger"
            for key in ordered[:5]
        ]
        evidence.append(
            f"{len(apart)} of {len(values)} parts differ; the median difference of all is {usual:.3g}"
        )
        if not changed.resumed:
            evidence.append("no resume at that step is recorded in events.jsonl")
        yield Cause(
            kind,
            f"the checkpoint of step {changed.step} is not what the steps before it lead to: "
            f"{_part(ordered[0])}" + (f" and {len(apart) - 1} more" if len(apart) > 1 else ""),
            changed.step + 1,
            math.inf,
            evidence,
            detail=changed,
        )


def _kind(changed: Changed, parts: Sequence[tuple[str, int | None]]) -> str:
    """What a changed checkpoint amounts to."""
    if all(".nu." in f".{name}" for name, _ in parts):
        return "second moment"
    weights = [(name, layer) for name, layer in parts if name.startswith("model.layers.")]
    if len({layer for _, layer in weights}) == 1 and any(
        changed.shrunk[part] < 0.1 for part in weights
    ):
        return "layer"
    return "checkpoint"


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


def _documents(
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
        surprising = by_loss >= UNUSUAL or min(by_loss, by_gradient) >= _BOTH
        explains = _explains(loss, contribution.loss_without) or _explains(
            norm, contribution.norm_without, logarithm=True
        )
        if not (surprising and max(moved, removed) >= _RELEVANT) and not explains:
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


def _layers(history: History, recorded: Recorded) -> Iterator[Cause]:
    """Layers whose gradient, logits or activations are out of line, and more so than other layers'."""
    for name, comparisons in layer_comparisons(history).items():
        surprises = np.array([c.surprise if c is not None else 0.0 for c in comparisons])
        for layer, surprise in enumerate(surprises):
            others = np.delete(surprises, layer)
            if (
                len(others)
                and surprise >= UNUSUAL
                and surprise > _ALONE * max(np.median(others), 1)
            ):
                comparison = comparisons[layer]
                assert comparison is not None
                yield Cause(
                    "layer",
                    f"layer {layer}: {name} out of line",
                    history.steps[-1].step,
                    float(surprise),
                    [
                        f"{math.exp(comparison.value):.3g}, by the steps before "
                        f"{math.exp(comparison.expected):.3g}: {surprise:.1f} spreads above"
                    ],
                    result=True,
                )


def layer_comparisons(history: History) -> dict[str, list[Comparison | None]]:
    """Of each layer the gradient's norm, update's norm, and sizes of activations and attention logits.

    They are compared as logarithms with those of the replayed steps before.
    """
    series: dict[str, list[np.ndarray]] = {}
    for one in history.steps:
        norms = {
            name: value for name, value in one.statistics.norms.items() if ".layers." in f".{name}"
        }
        for kind in ("gradient", "update"):
            squares = [
                np.square(np.asarray(getattr(value, kind), float)) for value in norms.values()
            ]
            series.setdefault(kind, []).append(np.sqrt(np.sum(squares, axis=0)))
        activations = one.statistics.activations
        for kind, sizes in (
            ("residual stream", activations.residual_rms),
            ("attention logits", activations.logit_max),
        ):
            series.setdefault(kind, []).append(np.asarray(sizes, float))
    compared = {}
    for name, values in series.items():
        logs = np.log(np.maximum(np.array(values), 1e-300))
        compared[name] = [
            compare(float(column[-1]), column[:-1].tolist(), floor=0.05, trend=True)
            for column in logs.T
        ]
    return compared


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


def _parameters(findings: Sequence[Finding]) -> str:
    first = _parameter(findings[0])
    return first if len(findings) == 1 else f"{first} and {len(findings) - 1} more"


def _parameter(finding: Finding) -> str:
    return _part((finding.name, finding.layer))


def _part(key: tuple[str, int | None]) -> str:
    name, layer = key
    return name if layer is None else f"{name} of layer {layer}"
