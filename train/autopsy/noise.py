"""How far a value is out of line with others of its kind, in units of their own spread."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# a value this many spreads away is unusual: the largest of a few dozen reference values is at most 3 away
UNUSUAL = 8.0
# fewer values do not tell what is usual
FEWEST = 8


class Comparison(NamedTuple):
    """A value beside what was to be expected.

    spread: of the reference values around what was expected of them.
    surprise: (value - expected) / spread.
    """

    value: float
    expected: float
    spread: float
    surprise: float

    @property
    def unusual(self) -> bool:
        """Whether the value is far above what was expected, or not finite."""
        return not self.surprise < UNUSUAL


def compare(
    value: float, reference: Sequence[float], *, floor: float, trend: bool = False
) -> Comparison | None:
    """A value beside the reference values; None if they are too few to tell.

    The spread is the standard deviation that the median absolute deviation stands for or, for a
    distribution with a longer tail, the one with which the largest value would be the expected maximum of
    as many normal ones. So a value is not unusual where a few of the reference values are nearly as large.

    Args:
        floor: the smallest spread.
        trend: the reference values are a series in time, which the value continues: a line through them
            (Theil-Sen) is extrapolated.

    >>> usual = [1.0, 2.0, 1.5] * 4
    >>> compare(9.0, usual, floor=0.1).unusual, compare(3.0, usual, floor=0.1).unusual
    (True, False)
    """
    numbers = np.asarray([number for number in reference if math.isfinite(number)], float)
    if len(numbers) < FEWEST:
        return None
    expected, deviations = _line(numbers) if trend else _median(numbers)
    scale = 1.4826 * float(np.median(np.abs(deviations)))
    longest = float(deviations.max()) / math.sqrt(2 * math.log(len(numbers)))
    spread = max(scale, longest, floor)
    surprise = (value - expected) / spread if math.isfinite(value) else math.inf
    return Comparison(value, expected, spread, surprise)


def _median(numbers: np.ndarray) -> tuple[float, np.ndarray]:
    middle = float(np.median(numbers))
    return middle, numbers - middle


def _line(numbers: np.ndarray) -> tuple[float, np.ndarray]:
    """What a line through the numbers gives for the next one, and how far they are from the line."""
    times = np.arange(len(numbers)) - len(numbers)  # the next one is at 0
    first, second = np.triu_indices(len(numbers), 1)
    slope = np.median((numbers[second] - numbers[first]) / (times[second] - times[first]))
    intercept = float(np.median(numbers - slope * times))
    return intercept, numbers - slope * times - intercept
