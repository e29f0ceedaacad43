"""All that was found out about a step, and as JSON."""

import math
from typing import Any, NamedTuple

import numpy as np

from train.autopsy.cause import Cause
from train.autopsy.counterfactuals import Outcome
from train.autopsy.documents import compare_gradients, describe
from train.autopsy.history import History
from train.autopsy.layer_causes import layer_comparisons
from train.autopsy.noise import Comparison
from train.autopsy.record import Recorded
from train.autopsy.replay import Replay
from train.autopsy.symptoms import Symptom


class Autopsy(NamedTuple):
    """comparisons: of the losses of the pieces in the step's batch. texts: the beginning of each, or ""."""

    replay: Replay
    step: int
    history: History
    recorded: Recorded
    symptoms: list[Symptom]
    causes: list[Cause]
    comparisons: list[Comparison | None]
    texts: list[str]
    outcomes: list[Outcome]


def to_json(autopsy: Autopsy) -> dict[str, Any]:
    """As JSON values; what is not a finite number is null."""
    replay, history, recorded = autopsy.replay, autopsy.history, autopsy.recorded
    documents = []
    pieces = history.steps[-1].pieces
    gradients = compare_gradients(pieces, [one.norm for one in recorded.contributions])
    for piece, contribution, comparison, gradient, text in zip(
        pieces,
        recorded.contributions,
        autopsy.comparisons,
        gradients,
        autopsy.texts,
        strict=True,
    ):
        fields = contribution._asdict()
        by_layer = dict(zip(recorded.groups, fields.pop("by_layer"), strict=True))
        documents.append(
            describe(replay, piece.piece)
            | {"labels": piece.piece.labels, "text": text}
            | fields
            | {
                "by_layer": by_layer,
                "surprise": comparison and comparison.surprise,
                "gradient_surprise": gradient and gradient.surprise,
            }
        )
    branches = recorded.branches._asdict()
    content = {
        "run": str(replay.folder),
        "step": autopsy.step,
        "replay": {
            "from": history.start,
            "steps_compared": history.compared,
            "different": [
                {"step": step, "replayed": replayed, "recorded": logged}
                for step, (replayed, logged) in history.unlike.items()
            ],
        },
        "unusual": any(symptom.unusual for symptom in autopsy.symptoms),
        "symptoms": [
            {"name": symptom.name, "value": symptom.value, "unusual": symptom.unusual}
            | (symptom.comparison._asdict() if symptom.comparison else {})
            | {"value": symptom.value}
            for symptom in autopsy.symptoms
        ],
        "causes": [
            {
                "kind": cause.kind,
                "name": cause.name,
                "since": cause.since,
                "surprise": cause.surprise,
                "may_be_a_result": cause.result,
                "evidence": cause.evidence,
                "documents": [describe(replay, piece) for piece in cause.pieces],
            }
            for cause in autopsy.causes
        ],
        "recorded": {
            "dtype": recorded.dtype,
            "loss": recorded.loss,
            "gradient_norm": recorded.grad_norm,
            "labels": recorded.num_tokens,
        },
        "optimizer": recorded.terms._asdict(),
        "documents": documents,
        "layers": {
            "branches": branches,
            "norms": {name: norms._asdict() for name, norms in recorded.norms.items()},
            "surprise": {
                name: [comparison and comparison.surprise for comparison in comparisons]
                for name, comparisons in layer_comparisons(history).items()
            },
        },
        "counterfactuals": [outcome._asdict() for outcome in autopsy.outcomes],
    }
    return _plain(content)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(nested) for key, nested in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(nested) for nested in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
