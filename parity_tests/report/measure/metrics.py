"""Errors of two programs against the oracle, and when one of them has drifted.

Every position counts alike: its error is relative to the size of its own row, and positions are pooled as a
root of mean squares. Pooled over raw values instead, the few huge activations that trained Llamas have at
single tokens would decide by chance (measured: ratios of 1.4 between equally good programs).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parity_tests.reference.tolerances import ROUNDING_RATIO

_BLOCK = 1 << 17  # elements whose errors are formed at once, in the processor's cache


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


def errors(values: Tensor, reference: Tensor, eps: float, rows: int) -> Errors:
    """Errors of `values`, in any dtype, against `reference`; both are reshaped to [rows, -1]."""
    if values.numel() != reference.numel():
        raise ValueError(f"shape {list(values.shape)}, expected {list(reference.shape)}")
    values, reference = values.reshape(rows, -1), reference.reshape(rows, -1)
    step = max(1, _BLOCK // reference.shape[1])
    blocks = zip(values.split(step), reference.split(step), strict=True)
    parts = zip(*(_row_errors(*block) for block in blocks), strict=True)
    scale, error, worst = map(torch.cat, parts)
    last_place = eps * torch.exp2(torch.floor(torch.log2(scale)))
    relative = _ratio(error, scale)
    return Errors(
        rms=pooled(relative.numpy()),
        max=float(_ratio(worst, scale).max()),
        ulps=pooled(_ratio(error, last_place).numpy()),
        max_ulps=float(_ratio(worst, last_place).max()),
        by_position=relative.float().numpy(),
    )


def _row_errors(values: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the rms of the reference, and the rms and the maximum of the difference."""
    reference = reference.double()
    difference = values.double() - reference
    scale = reference.shape[1] ** -0.5
    return (
        torch.linalg.vector_norm(reference, dim=1) * scale,
        torch.linalg.vector_norm(difference, dim=1) * scale,
        torch.linalg.vector_norm(difference, ord=torch.inf, dim=1),
    )


def compare(
    name: str, ours: Tensor, theirs: Tensor, reference: Tensor, *, eps: float, rows: int
) -> Comparison:
    """Both programs' tensor of that name against the oracle's, as `errors`."""
    of_ours, of_theirs = (errors(values, reference, eps, rows) for values in (ours, theirs))
    return Comparison(name, of_ours, of_theirs, eps)


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


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale; 0 where both are 0."""
    return torch.where(error == 0, 0.0, error / scale)
