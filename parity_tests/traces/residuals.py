"""How far recorded arrays are from what they should be, in units of what rounding explains.

Of every array there are three values: the recorded one, the exact one, and that of a program which rounds
like the recorded one, both computed from the recorded values of the steps before. A row (a position, or
an output feature of a weight) may be as far off as that program's error, as one rounding of the row itself,
and as one rounding of a row of middling size: sums that cancel in one order of summation need not in
another.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LIMIT = 4.0
"""Times what rounding explains. In 102 recordings of right programs, 2.1 was the largest of any array."""

_BLOCK = 1 << 20  # elements that are float64 at once


class Residual(NamedTuple):
    """The error of one array.

    Attributes:
        name: of the step, or of the parameter whose gradient it is.
        direction: "forward", "backward" or "step".
        rms, expected: root mean squares over rows of the relative error: recorded, and of a program that
            rounds alike.
        ratio: rms over rows of the error in units of what rounding explains; NaN where it is not finite.
        by_row: the same of each row: for a step, of each position [B * T].
        errors, expected_errors: relative rms error of each row.
        largest, expected_largest: relative to the rms of their row.
        ulps: eps of the recorded dtype.
        heads: those that are beyond the limit, where some are and some are not.
    """

    name: str
    direction: str
    rms: float
    expected: float
    ratio: float
    by_row: np.ndarray
    errors: np.ndarray
    expected_errors: np.ndarray
    largest: float
    expected_largest: float
    eps: float
    heads: tuple[int, ...] = ()

    @property
    def departs(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.ratio <= LIMIT


# a program that is wrong can make infinities, and their difference is NaN, which departs
@np.errstate(over="ignore", invalid="ignore")
def residual(
    name: str,
    direction: str,
    recorded: np.ndarray,
    exact: np.ndarray,
    rounded: np.ndarray,
    *,
    eps: float,
    rows: int,
    counted: np.ndarray | None = None,
    heads: int = 0,
    least: float = 0.0,
) -> Residual:
    """Compare an array with its exact values.

    Args:
        rounded: values of a program that rounds like the recorded one.
        eps: spacing of the recorded dtype at 1.
        rows: number of rows, of equal size.
        counted: bool [rows], which of them are compared; default: all.
        heads: number of heads that a row has side by side; 0 for none.
        least: rms of a row that no row of middling size falls below.
    """
    parts = list(
        _squares(
            recorded.reshape(rows, -1), exact.reshape(rows, -1), rounded.reshape(rows, -1), heads
        )
    )
    squares = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if counted is None:
        counted = np.ones(rows, bool)
    counted = counted & (
        (squares["exact"] > 0) | (squares["error"] > 0) | ~np.isfinite(squares["error"])
    )
    if not counted.any():
        none = np.zeros(rows)
        return Residual(name, direction, 0.0, 0.0, 0.0, none, none, none, 0.0, 0.0, eps)
    size = squares["exact"][counted]
    middling = max(float(np.median(size[size > 0])) if (size > 0).any() else 0.0, least**2)
    explained = squares["rounded"] + (eps / 2) ** 2 * (squares["exact"] + middling)
    ratios = np.where(counted, _ratio(squares["error"], explained), 0.0)
    scale = np.maximum(squares["exact"], middling * 2.0**-12)
    errors, expected = (
        np.where(counted, np.sqrt(_ratio(squares[key], scale)), 0.0) for key in ("error", "rounded")
    )
    largest, expected_largest = (
        float(np.max(_ratio(squares[key], np.sqrt(scale))[counted]))
        for key in ("worst", "worst_rounded")
    )
    ratio = float(np.sqrt(np.mean(ratios[counted])))
    return Residual(
        name,
        direction,
        rms=_rms(errors[counted]),
        expected=_rms(expected[counted]),
        ratio=ratio,
        by_row=np.sqrt(ratios),
        errors=errors,
        expected_errors=expected,
        largest=largest,
        expected_largest=expected_largest,
        eps=eps,
        heads=_heads(squares, counted, middling, eps) if heads and not ratio <= LIMIT else (),
    )


def _squares(
    recorded: np.ndarray, exact: np.ndarray, rounded: np.ndarray, heads: int
) -> Iterator[dict[str, np.ndarray]]:
    """Mean squares of each row, a block of rows at a time."""
    rows, width = exact.shape
    step = max(1, _BLOCK // width)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        values, reference, other = (
            array[block].astype(np.float64) for array in (recorded, exact, rounded)
        )
        error, noise = values - reference, other - reference
        squares = {
            "exact": np.mean(np.square(reference), axis=1),
            "error": np.mean(np.square(error), axis=1),
            "rounded": np.mean(np.square(noise), axis=1),
            "worst": np.max(np.abs(error), axis=1),
            "worst_rounded": np.max(np.abs(noise), axis=1),
        }
        if heads:
            for key, array in (("error", error), ("rounded", noise), ("exact", reference)):
                by_head = array.reshape(len(array), heads, -1)
                squares[f"{key} of heads"] = np.mean(np.square(by_head), axis=2)
        yield squares


def _heads(
    squares: dict[str, np.ndarray], counted: np.ndarray, middling: float, eps: float
) -> tuple[int, ...]:
    error, noise, exact = (
        squares[f"{key} of heads"][counted].mean(axis=0) for key in ("error", "rounded", "exact")
    )
    beyond = ~(np.sqrt(_ratio(error, noise + (eps / 2) ** 2 * (exact + middling))) <= LIMIT)
    return () if beyond.all() else tuple(np.flatnonzero(beyond).tolist())


def _ratio(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """value / scale; 0 where both are 0, infinite where only the scale is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(value == 0, 0.0, value / scale)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
