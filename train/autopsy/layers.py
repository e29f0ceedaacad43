"""Halves of layers that have died: that get no gradient, or whose weights or units are gone."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from train.program.statistics import Statistics

HALVES = {"attention": "self_attn", "MLP": "mlp"}
# Norms differ between layers. One is called dead that is smaller than the smallest of the others by as much
# as those differ from each other, and by these factors besides.
_GRADIENT, _PARAMETER = 30.0, 5.0
# share of units that let nothing through, in a dead half, and at most in the others
_DEAD, _ALIVE = 0.99, 0.5


class Dead(NamedTuple):
    """A half of a layer: `attention` or `MLP`. since: the first step in which it is dead."""

    layer: int
    half: str
    since: int
    reasons: list[str]


def dead_halves(steps: Sequence[tuple[int, Statistics]]) -> list[Dead]:
    """Halves of layers that are dead in any of the steps, by the statistics of the run's own program.

    Each is compared with the same half of the other layers, and with itself in the steps before.
    """
    found: dict[tuple[int, str], Dead] = {}
    for index, (step, statistics) in enumerate(steps):
        before = [earlier for _, earlier in steps[:index]]
        layers = len(statistics.activations.dead_units)
        for half, module in HALVES.items():
            for layer in range(layers):
                if (layer, half) in found:
                    continue
                reasons = list(_reasons(statistics, before, half, module, layer))
                if reasons:
                    found[layer, half] = Dead(layer, half, step, reasons)
    return list(found.values())


def _reasons(
    statistics: Statistics, before: Sequence[Statistics], half: str, module: str, layer: int
) -> Iterator[str]:
    """Why a half of a layer is dead in a step; nothing for one that is alive."""
    matrices = [
        name
        for name, norms in statistics.norms.items()
        if f".layers.{module}." in name and name.endswith("proj.weight") and norms.gradient.ndim
    ]
    for kind, word, factor in (
        ("gradient", "gradient", _GRADIENT),
        ("parameter", "weight", _PARAMETER),
    ):
        vanished = []
        for name in matrices:
            values = np.asarray(getattr(statistics.norms[name], kind), float)
            own = [float(getattr(step.norms[name], kind)[layer]) for step in before]
            others = [*np.delete(values, layer), *own]
            if _vanished(values[layer], others, factor):
                vanished.append((name.rsplit(".", 2)[1], values[layer], others))
        if 2 * len(vanished) > len(matrices):
            names = ", ".join(name for name, *_ in vanished)
            largest = max(value for _, value, _ in vanished)
            usual = float(np.median([value for *_, others in vanished for value in others] or [0]))
            yield (
                f"norm of the {word} of {names}: at most {largest:.3g}, in other layers and earlier steps "
                f"{usual:.3g}"
            )
    if half == "MLP":
        units = np.asarray(statistics.activations.dead_units, float)
        own = [float(step.activations.dead_units[layer]) for step in before]
        others = [*np.delete(units, layer), *own]
        if others and units[layer] >= _DEAD and max(others) <= _ALIVE:
            yield (
                f"{units[layer]:.1%} of its units let nothing through, in other layers and before at "
                f"most {max(others):.1%}"
            )


def _vanished(value: float, others: Sequence[float], factor: float) -> bool:
    if value == 0:
        return True
    known = [other for other in others if other > 0]
    if not known:
        return False
    return bool(value * factor < min(known) * (min(known) / max(known)))
