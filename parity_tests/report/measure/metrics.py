"""Errors of two programs against the oracle, and when one of them has drifted.

Every position counts alike: its error is relative to the size of its own row, and positions are pooled as a
root of mean squares. Pooled over raw values instead, the few huge activations that trained Llamas have at
single tokens would decide by chance (measured: ratios of 1.4 between equally good programs).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity_tests.reference.tolerances import ROUNDING_RATIO


class Errors(NamedTuple):
    """rms, max: relative to the rms of the reference's row. ulps, max_ulps: the same in units in the last
    place of that rms. by_position: the relative rms error of each row, float32 [T]."""

    rms: float
    max: float
    ulps: float
    max_ulps: float
    by_position: np.ndarray


class Comparison(NamedTuple):
    """One module, parameter or output: `ours` is of the program under test, `theirs` of its baseline.

    eps: spacing of the computation's dtype at 1.
    """

    name: str
    ours: Errors
    theirs: Errors
    eps: float

    @property
    def drifted(self) -> bool:
        """Whether its rms error is beyond the tolerance; NaN is too."""
        return not self.ours.rms <= allowed(self.theirs.rms, self.eps)


def allowed(theirs: float, eps: float) -> float:
    """The largest rms error that is no drift: in proportion to theirs, or that of one correct rounding."""
    return max(ROUNDING_RATIO * theirs, eps / 2)


class LayerGroup(NamedTuple):
    """The same module or parameter of every layer, pooled: a single tensor's error can be chance.

    members: in the order of the layers. ours, theirs: rms errors, pooled over them.
    """

    name: str
    members: list[Comparison]
    ours: float
    theirs: float

    @property
    def allowed(self) -> float:
        return allowed(self.theirs, self.members[0].eps)

    @property
    def drifted(self) -> bool:
        return not self.ours <= self.allowed


def by_layer_group(comparisons: Iterable[Comparison]) -> list[LayerGroup]:
    """Groups in the order of their first members; in their names `*` stands for the layer."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        parts = comparison.name.split(".")
        name = ".".join("*" if part.isdigit() else part for part in parts)
        groups.setdefault(name, []).append(comparison)
    return [
        LayerGroup(
            name,
            members,
            pooled([member.ours.rms for member in members]),
            pooled([member.theirs.rms for member in members]),
        )
        for name, members in groups.items()
    ]


def first_to_drift(comparisons: Sequence[Comparison]) -> str | None:
    """The first name, in their order, that is beyond the tolerance itself and as a group."""
    groups = by_layer_group(comparisons)
    suspects = {member.name for group in groups if group.drifted for member in group.members}
    return next((c.name for c in comparisons if c.name in suspects and c.drifted), None)


def pooled(values: Any) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def windows(comparison: Comparison, count: int = 32) -> list[tuple[int, float, float]]:
    """Errors along the sequence, pooled over `count` windows: (first position, ours, theirs)."""
    ours, theirs = comparison.ours.by_position, comparison.theirs.by_position
    ends = np.linspace(0, len(ours), min(count, len(ours)) + 1).astype(int).tolist()
    return [(a, pooled(ours[a:b]), pooled(theirs[a:b])) for a, b in itertools.pairwise(ends)]


def position_of_drift(comparison: Comparison) -> int | None:
    """The first position of the first window that has drifted; None if it has not drifted as a whole."""
    if not comparison.drifted:
        return None
    return next(
        (
            first
            for first, ours, theirs in windows(comparison)
            if not ours <= allowed(theirs, comparison.eps)
        ),
        None,
    )
