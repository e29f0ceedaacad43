"""Errors of two programs against the oracle, and when one of them has drifted.

Every position counts alike: its error is taken relative to the size of its own row, and positions are
pooled as a root of mean squares. Pooled over raw values instead, the few huge activations that trained
Llamas have at single tokens would decide by luck (measured: ratios of 1.4 between equally good programs).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
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


class Compared(NamedTuple):
    """One module, parameter or output: `ours` is the program in question, `theirs` its yardstick.

    unit: the spacing of the computation's dtype at 1.
    """

    name: str
    ours: Errors
    theirs: Errors
    unit: float

    @property
    def drifted(self) -> bool:
        """Whether its rms error is beyond the tolerance; NaN is too."""
        return not self.ours.rms <= allowed(self.theirs.rms, self.unit)


def allowed(theirs: float, unit: float) -> float:
    """The largest rms error that is no drift: the yardstick's, or one correct rounding."""
    return max(ROUNDING_RATIO * theirs, unit / 2)


class Kind(NamedTuple):
    """What stands at the same place of every layer, pooled: a single tensor's error can be luck.

    members: in their order. ours, theirs: rms errors, pooled over them.
    """

    name: str
    members: list[Compared]
    ours: float
    theirs: float

    @property
    def allowed(self) -> float:
        return allowed(self.theirs, self.members[0].unit)

    @property
    def drifted(self) -> bool:
        return not self.ours <= self.allowed


def kinds(compared: Iterable[Compared]) -> list[Kind]:
    """In the order of their first members; names without the number of the layer."""
    groups: dict[str, list[Compared]] = {}
    for each in compared:
        name = ".".join("*" if part.isdigit() else part for part in each.name.split("."))
        groups.setdefault(name, []).append(each)
    return [
        Kind(
            name,
            members,
            pooled([each.ours.rms for each in members]),
            pooled([each.theirs.rms for each in members]),
        )
        for name, members in groups.items()
    ]


def first_to_drift(compared: Sequence[Compared]) -> str | None:
    """The first name, in their order, that is beyond the tolerance itself and of a kind that is."""
    drifted = {each.name for kind in kinds(compared) if kind.drifted for each in kind.members}
    return next((each.name for each in compared if each.name in drifted and each.drifted), None)


def pooled(values: Any) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def errors(got: Tensor, want: Tensor, unit: float, rows: int) -> Errors:
    """Errors of `got`, in any dtype, against `want`; both are seen as [rows, -1]."""
    if got.numel() != want.numel():
        raise ValueError(f"shape {list(got.shape)}, expected {list(want.shape)}")
    got, want = got.reshape(rows, -1), want.reshape(rows, -1)
    step = max(1, _BLOCK // want.shape[1])
    blocks = [_row_errors(*block) for block in zip(got.split(step), want.split(step), strict=True)]
    scale, error, worst = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    last_place = unit * torch.exp2(torch.floor(torch.log2(scale)))
    relative = _ratio(error, scale)
    return Errors(
        rms=pooled(relative.numpy()),
        max=float(_ratio(worst, scale).max()),
        ulps=pooled(_ratio(error, last_place).numpy()),
        max_ulps=float(_ratio(worst, last_place).max()),
        by_position=relative.float().numpy(),
    )


def _row_errors(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: rms of what is wanted, rms and maximum of the difference."""
    want = want.double()
    difference = got.double() - want
    size = want.shape[1] ** -0.5
    norms = (torch.linalg.vector_norm(each, dim=1) * size for each in (want, difference))
    return *norms, torch.linalg.vector_norm(difference, ord=torch.inf, dim=1)


def compare(
    name: str, ours: Tensor, theirs: Tensor, want: Tensor, unit: float, rows: int
) -> Compared:
    """Both programs' tensor of that name against the oracle's."""
    return Compared(name, errors(ours, want, unit, rows), errors(theirs, want, unit, rows), unit)


def windows(each: Compared, count: int = 32) -> list[tuple[int, float, float]]:
    """Errors along the sequence: (first position, ours, theirs), each pooled over a stretch of it."""
    ours, theirs = each.ours.by_position, each.theirs.by_position
    ends = np.linspace(0, len(ours), min(count, len(ours)) + 1).astype(int).tolist()
    return [(a, pooled(ours[a:b]), pooled(theirs[a:b])) for a, b in itertools.pairwise(ends)]


def position_of_drift(each: Compared) -> int | None:
    """Where it has drifted as a whole: the first position of the first stretch that has."""
    if not each.drifted:
        return None
    stretches = windows(each)
    return next(
        (first for first, ours, theirs in stretches if not ours <= allowed(theirs, each.unit)),
        None,
    )


def as_json(each: Compared) -> Mapping[str, object]:
    def numbers(errors: Errors) -> dict[str, float]:
        return {name: getattr(errors, name) for name in ("rms", "max", "ulps", "max_ulps")}

    return {
        "name": each.name,
        "ours": numbers(each.ours),
        "theirs": numbers(each.theirs),
        "drifted": each.drifted,
    }


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale; 0 where both are 0."""
    return torch.where(error == 0, 0.0, error / scale)
