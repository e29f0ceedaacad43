"""Where two runs part, beside what two roundings of one run do."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parity_tests.trajectory.logs import Log, relative_difference

# what a step computes, and what it is given: rounding makes only the former drift
OUTCOMES = ("loss", "grad_norm", "validation_loss")
INPUTS = ("learning_rate", "num_tokens")
INPUT_TOLERANCE = 1e-6  # relative: the rounding of a schedule in float32
FACTOR = 30.0
_FEW = 6  # decimals that a program prints; those of a float32 are more


class Curve(NamedTuple):
    """Of one metric, by step, the difference of A and B and the largest so far of the two roundings.

    All [steps]; `rounding` is empty without two roundings. `departs` is the first step at which the
    difference is more than the factor times the rounding, or None.
    """

    metric: str
    steps: np.ndarray
    differences: np.ndarray
    rounding: np.ndarray
    floor: float
    departs: int | None

    @property
    def ratios(self) -> np.ndarray:
        """Difference as a multiple of the rounding."""
        return self.differences / np.maximum(self.rounding, self.floor)


class Input(NamedTuple):
    """A metric that is given to the steps: the first one at which A and B have different values."""

    metric: str
    step: int
    a: float
    b: float


class Trajectory(NamedTuple):
    """curves: of outcomes that both logs have. inputs: those that differ. departs: see `Curve`."""

    a: Path
    b: Path
    factor: float
    curves: list[Curve]
    inputs: list[Input]
    has_rounding: bool

    @property
    def departs(self) -> Curve | None:
        """The curve that departs first; None if none does."""
        departing = [curve for curve in self.curves if curve.departs is not None]
        return min(departing, key=lambda curve: curve.departs or 0, default=None)

    @property
    def same(self) -> bool:
        """Whether no outcome differs at all."""
        return not any(curve.differences.any() for curve in self.curves)


def compare(a: Log, b: Log, rounding: tuple[Log, Log] | None, factor: float = FACTOR) -> Trajectory:
    """Compare the outcomes at all steps that A and B have in common, and the inputs.

    Differences by rounding grow from step to step, so those of A and B are compared with the largest that
    `rounding`, two runs that differ in nothing else, has had up to the step. The factor is for chance, and
    for programs that round in more places than those two differ in.

    Raises:
        ValueError: no metric or no step in common; roundings that have none of them.
    """
    names = [name for name in OUTCOMES if name in a.metrics and name in b.metrics]
    if not names:
        raise ValueError(
            f"{a.path} and {b.path}: no common metric among {', '.join(OUTCOMES)}: found "
            f"{_listed(a.metrics)} and {_listed(b.metrics)}"
        )
    curves = []
    for name in names:
        steps = sorted(_alike(name, a, b).keys() & _alike(name, b, a).keys())
        if rounding is not None:
            steps = [step for step in steps if step <= _last(rounding, name)]
        if steps:
            curves.append(_curve(name, steps, a, b, rounding, factor))
    if not curves:
        if rounding is not None:
            raise ValueError(
                f"{rounding[0].path} and {rounding[1].path}: have no common step of {' or '.join(names)} "
                f"before the last of {a.path} and {b.path}"
            )
        raise ValueError(
            f"{a.path} and {b.path}: no common step: the one has {_span(a)}, the other {_span(b)}"
        )
    inputs = [first for name in INPUTS if (first := _first_other(name, a, b)) is not None]
    return Trajectory(a.path, b.path, factor, curves, inputs, rounding is not None)


def _curve(
    name: str, steps: list[int], a: Log, b: Log, rounding: tuple[Log, Log] | None, factor: float
) -> Curve:
    one, other = _alike(name, a, b), _alike(name, b, a)
    differences = np.asarray([relative_difference(one[step], other[step]) for step in steps])
    floor = max(map(_resolution, (a, b, *(rounding or ()))))
    if rounding is None:
        infinite = np.asarray(steps)[np.isinf(differences)]  # whatever rounding does
        departs = int(infinite[0]) if len(infinite) else None
        return Curve(name, np.asarray(steps), differences, np.zeros(0), floor, departs)
    c, d = (log.metrics[name] for log in rounding)
    common = sorted(c.keys() & d.keys())
    largest = np.maximum.accumulate([relative_difference(c[step], d[step]) for step in common])
    # before the first step that the roundings have, there is none to compare with
    at = np.searchsorted(common, steps, side="right") - 1
    allowed = np.where(at < 0, 0.0, largest[np.maximum(at, 0)])
    printed = sum(_half_of_last_digit(log.metrics[name]) for log in (a, b))
    beyond = differences > factor * np.maximum(allowed, floor) + printed
    departs = int(np.asarray(steps)[beyond][0]) if beyond.any() else None
    return Curve(name, np.asarray(steps), differences, allowed, floor, departs)


def _alike(name: str, log: Log, other: Log) -> dict[int, float]:
    """The values of a log: where the other has means over steps, means over the same steps."""
    values = log.metrics[name]
    if name not in other.means or name in log.means:
        return values
    result, before = {}, 0
    for step in sorted(other.metrics[name]):
        within = [values[at] for at in range(before + 1, step + 1) if at in values]
        if len(within) == step - before:
            result[step] = float(np.mean(within))
        before = step
    return result


def _half_of_last_digit(values: dict[int, float]) -> float:
    """Relative to the values, of a metric that was written with few decimals; 0 for one that was not."""
    finite = [abs(value) for value in values.values() if math.isfinite(value) and value]
    decimals = [len(f"{value!r}".partition("e")[0].partition(".")[2]) for value in finite]
    if not finite or max(decimals) > _FEW or any("e" in f"{value!r}" for value in finite):
        return 0.0
    return 0.5 * 10.0 ** -max(decimals) / float(np.median(finite))


def _resolution(log: Log) -> float:
    """Half of the last bit of the run's dtype, relative: float32 if all values of an outcome are in it.

    Others may be sums of float32 in Python, such as a validation loss over several batches.
    """

    def is_narrow(name: str) -> bool:
        numbers = np.asarray(list(log.metrics[name].values()))
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = numbers.astype(np.float32).astype(np.float64)
        return np.array_equal(rounded, numbers, equal_nan=True)

    narrow = any(is_narrow(name) for name in OUTCOMES if name in log.metrics)
    return 2.0**-24 if narrow else 2.0**-53


def _last(rounding: tuple[Log, Log], name: str) -> float:
    c, d = (log.metrics.get(name, {}) for log in rounding)
    return max(c.keys() & d.keys(), default=-math.inf)


def _first_other(name: str, a: Log, b: Log) -> Input | None:
    one, other = a.metrics.get(name, {}), b.metrics.get(name, {})
    for step in sorted(one.keys() & other.keys()):
        if relative_difference(one[step], other[step]) > INPUT_TOLERANCE:
            return Input(name, step, one[step], other[step])
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _span(log: Log) -> str:
    steps = log.steps
    return f"steps {steps[0]} to {steps[-1]}"
