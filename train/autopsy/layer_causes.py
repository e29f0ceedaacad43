"""Layers whose gradients, updates or activations are out of line with the steps before."""

import math
from collections.abc import Iterator

import numpy as np

from train.autopsy.cause import Cause
from train.autopsy.history import History
from train.autopsy.noise import UNUSUAL, Comparison, compare

# a layer is out of line on its own if its surprise is this many times that of most other layers
_ALONE = 2.0


def layers_out_of_line(history: History) -> Iterator[Cause]:
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
