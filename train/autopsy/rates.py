"""Learning rates that jumped."""

from typing import NamedTuple

import numpy as np

# A rate jumps if it grows by more than half, and by this many times more than in any step before: in a
# linear warmup, every step grows as much as the first.
_GROWTH, _TIMES = 0.5, 3.0


class Jump(NamedTuple):
    """The step, counted from 1, whose rate is `rate` after `before` in the step before it.

    usual: the largest growth in one step until then.
    """

    step: int
    rate: float
    before: float
    usual: float


def jumps(rates: np.ndarray, first: int, last: int) -> list[Jump]:
    """The jumps in steps `first` to `last`, counted from 1.

    >>> jumps(np.array([1.0, 2.0, 3.0, 3.0, 3.0, 30.0, 30.0]), 1, 7)
    [Jump(step=6, rate=30.0, before=3.0, usual=1.0)]
    """
    growth = np.diff(rates, prepend=0.0)
    found = []
    for step in range(max(first, 2), min(last, len(rates)) + 1):
        rate, before = float(rates[step - 1]), float(rates[step - 2])
        # the first step grew from nothing, which tells of a warmup only until the second has
        usual = float(growth[min(1, step - 2) : step - 1].max())
        if rate > (1 + _GROWTH) * before and growth[step - 1] > _TIMES * usual:
            found.append(Jump(step, rate, before, usual))
    return found
