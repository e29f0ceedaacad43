"""What may be wrong with the state that a step starts from: layers, second moments, checkpoints."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from train.autopsy.cause import Cause
from train.autopsy.history import RECENT, Changed, History
from train.autopsy.layers import HALVES, Dead
from train.autopsy.moments import Finding, out_of_line
from train.autopsy.parts import part_in_words
from train.autopsy.replay import Replay

# where a replay differs from the run by rounding, a part of a checkpoint must differ this many times more
# than most parts do
_DIFFERENT = 100.0


def dead_layers(dead: Sequence[Dead]) -> Iterator[Cause]:
    """One cause for each layer."""
    for layer in sorted({half.layer for half in dead}):
        halves = [half for half in dead if half.layer == layer]
        names = " and ".join(half.half for half in halves)
        evidence = [f"{half.half}: {reason}" for half in halves for reason in half.reasons]
        since = min(half.since for half in halves)
        yield Cause("layer", f"layer {layer}: {names} dead", since, math.inf, evidence)


def wrong_moments(replay: Replay, history: History, dead: Sequence[Dead]) -> Iterator[Cause]:
    """Second moments out of line with gradients, in each state that was looked at."""
    options = replay.options.optimizer
    named: set[tuple[str, int | None]] = set()
    modules = {(half.layer, HALVES[half.half]) for half in dead}
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


def changed_checkpoints(history: History) -> Iterator[Cause]:
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
            f"{part_in_words(*key)}: the saved norm is {changed.shrunk[key]:.3g} times the replayed one, "
            f"and they differ by {apart[key]:.3g} of the larger"
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
            f"{part_in_words(*ordered[0])}"
            + (f" and {len(apart) - 1} more" if len(apart) > 1 else ""),
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


def _parameters(findings: Sequence[Finding]) -> str:
    first = _parameter(findings[0])
    return first if len(findings) == 1 else f"{first} and {len(findings) - 1} more"


def _parameter(finding: Finding) -> str:
    return part_in_words(finding.name, finding.layer)
