"""Errors of two programs against the oracle, and when one of them has drifted.

Every position counts alike: its error is taken relative to the size of its own row, and positions are
pooled as a root of mean squares. Pooled over raw values instead, the few huge activations that trained
Llamas have at single tokens would decide by luck (measured: ratios of 1.4 between equally good programs).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1.25  # rules P2 and P3: at most this times the error of the program it is measured by


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
    def allowed(self) -> float:
        """The largest rms error that is no drift: the yardstick's, or one correct rounding."""
        return max(TOLERANCE * self.theirs.rms, self.unit / 2)

    @property
    def drifted(self) -> bool:
        """NaN has drifted too."""
        return not self.ours.rms <= self.allowed

    @property
    def ratio(self) -> float:
        """Of the two rms errors; 1 where both are within a rounding."""
        if max(self.ours.rms, self.theirs.rms) <= self.unit / 2:
            return 1.0
        return self.ours.rms / self.theirs.rms if self.theirs.rms else float("inf")


def unit_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def errors(got: Tensor, want: Tensor, unit: float, rows: int) -> Errors:
    """Errors of `got`, in any dtype, against `want`; both are seen as [rows, -1]."""
    if got.numel() != want.numel():
        raise ValueError(f"shape {list(got.shape)}, expected {list(want.shape)}")
    want = want.reshape(rows, -1).double()
    difference = got.reshape(rows, -1).double() - want
    scale = want.square().mean(1).sqrt()
    error, worst = difference.square().mean(1).sqrt(), difference.abs().amax(1)
    last_place = unit * torch.exp2(torch.floor(torch.log2(scale)))
    relative = _ratio(error, scale)
    return Errors(
        rms=float(relative.square().mean().sqrt()),
        max=float(_ratio(worst, scale).max()),
        ulps=float(_ratio(error, last_place).square().mean().sqrt()),
        max_ulps=float(_ratio(worst, last_place).max()),
        by_position=relative.float().numpy(),
    )


def compare(name: str, ours: Tensor, theirs: Tensor, want: Tensor, unit: float, rows: int):
    return Compared(name, errors(ours, want, unit, rows), errors(theirs, want, unit, rows), unit)


def first_to_drift(compared: Iterable[Compared]) -> str | None:
    """The first name, in their order, whose error is beyond the tolerance."""
    return next((each.name for each in compared if each.drifted), None)


def windows(each: Compared, count: int = 32) -> list[tuple[int, float, float]]:
    """Errors along the sequence: (first position, ours, theirs), each pooled over a stretch of it."""
    length = len(each.ours.by_position)
    starts = [length * n // count for n in range(count)] if length >= count else range(length)

    def pooled(values: np.ndarray, first: int, last: int) -> float:
        return float(np.sqrt(np.mean(np.square(values[first:last], dtype=np.float64))))

    return [
        (
            first,
            pooled(each.ours.by_position, first, last),
            pooled(each.theirs.by_position, first, last),
        )
        for first, last in zip(starts, [*starts[1:], length], strict=True)
    ]


def position_of_drift(each: Compared) -> int | None:
    """The first position of the first stretch of the sequence that is beyond the tolerance."""
    for first, ours, theirs in windows(each):
        if not ours <= max(TOLERANCE * theirs, each.unit / 2):
            return first
    return None


def as_json(each: Compared) -> Mapping[str, object]:
    def numbers(errors: Errors) -> dict[str, float]:
        return {name: getattr(errors, name) for name in ("rms", "max", "ulps", "max_ulps")}

    return {
        "name": each.name,
        "ours": numbers(each.ours),
        "theirs": numbers(each.theirs),
        "ratio": each.ratio,
        "drifted": each.drifted,
    }


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale; 0 where both are 0."""
    return torch.where(error == 0, 0.0, error / scale)
