"""Why a recording departs: the fault that, put into the oracle, explains what was recorded.

Every step is computed from recorded values, so the first departing array tells which faults can be the
cause: those that begin in its step. Each of them is put into the section of that array. Those that explain
it down to rounding are put into all sections with departures, and the one that leaves the fewest is the
cause. The search goes on from there with the next departure, so that several faults are found one after
the other.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from parity_tests.faults import optimizer
from parity_tests.faults.catalogue import FAULTS
from parity_tests.faults.change import Change, Family, Fault
from parity_tests.report.programs.checkpoint import EMBEDDING, Checkpoint
from parity_tests.traces.faulty_oracle import FaultyOracle, Rounded
from parity_tests.traces.names import COS, SIN, array_of, input_of, output_of, section_of, steps_of
from parity_tests.traces.optimizer_step import Rule, step_residuals
from parity_tests.traces.oracle_sections import OracleSections
from parity_tests.traces.residuals import Residual
from parity_tests.traces.trace import Trace
from parity_tests.traces.walk import Walk

_FALL = 8.0
"""By which the error has to fall if the fault rounds: a value may be rounded up here and down there."""
_FALL_OF_GRADIENTS = 3.0
_MOST = 4  # causes
_GRID = 31  # numbers from which a fit begins, if it fails from the known ones
_NO_SENSE = (ValueError, RuntimeError, ArithmeticError, KeyError, IndexError)
"""Of a change that makes no sense in a model."""
_HELD = 1 << 29  # bytes of rounding errors that are kept

Key = tuple[str, str]
"""Direction and name of an array."""


class Cause(NamedTuple):
    """Of a departure.

    Attributes:
        name: of the fault; None if none of the catalogue explains it.
        words: the fault, for people.
        departure: the array that it was found by, as it departed.
        after: its error with the fault in the oracle, or the least that any fault leaves.
        explained: number of departing arrays that the fault explains.
        layers: those that have the fault.
        equals: other faults that explain as much.
        nearest: if none explains it, the one that leaves the least error.
        convention: it is no mistake; see `Fault`.
    """

    name: str | None
    words: str
    departure: Residual
    after: float
    explained: int
    layers: tuple[int, ...] = ()
    equals: tuple[str, ...] = ()
    nearest: str = ""
    convention: bool = False


class _Hypothesis(NamedTuple):
    fault: Fault
    words: str
    change: Change
    residual: Residual  # of the first departure


class _Confirmed(NamedTuple):
    hypothesis: _Hypothesis
    residuals: dict[Key, Residual]
    explained: set[Key]
    broken: int


class Search:
    """Finds causes.

    Args:
        walk: of the trace, with the right oracle and what rounds as the recording.
        residuals: all that the check has found.
    """

    def __init__(
        self, walk: Walk, checkpoint: Checkpoint, dtype: Any, residuals: Iterable[Residual]
    ) -> None:
        self.walk, self.checkpoint, self.dtype = walk, checkpoint, dtype
        self.residuals = {_key(residual): residual for residual in residuals}
        self.settled: set[Key] = set()
        self.changes: dict[str, list[Change]] = {}
        self.agreed = dict(self.residuals)
        self._noise: dict[Any, dict[str, np.ndarray]] = {}

    def causes(self) -> Iterator[Cause]:
        """In the order of the departures that they explain."""
        found = 0
        while found < _MOST:
            departing = self._departing()
            if not departing:
                return
            first = departing[0]
            cause = self._cause(first)
            if cause is None:
                kind = _local(first.name)
                self.settled |= {_key(r) for r in departing if _local(r.name) == kind}
                if first.direction == "forward":  # its gradients are of a value that is unknown
                    self.settled |= {_key(r) for r in departing if r.direction == "backward"}
                elif found:
                    continue
                cause = self._unknown(first)
            found += not cause.convention
            yield cause

    def _departing(self) -> list[Residual]:
        return [r for key, r in self.residuals.items() if r.departs and key not in self.settled]

    def _cause(self, first: Residual) -> Cause | None:
        candidates = [fault for fault in FAULTS.values() if self._can_be(fault, first)]
        tried = list(self._tried(first, candidates))
        self.nearest = min(tried, key=lambda h: _size(h.residual), default=None)
        explaining = [h for h in tried if self._explains(h, first)]
        if not explaining:
            fitted = list(self._fitted(first, candidates))
            tried += fitted
            self.nearest = min(tried, key=lambda h: _size(h.residual), default=None)
            explaining = [h for h in fitted if self._explains(h, first)]
        if not explaining:
            return None
        if all(h.fault.rounds for h in explaining):
            least = min(_size(h.residual) for h in explaining)
            explaining = [h for h in explaining if _size(h.residual) <= _FALL * least]
        confirmed = [self._confirm(h) for h in explaining]
        fewest = min(map(_left, confirmed))
        best, *equal = (c for c in confirmed if _left(c) == fewest)
        names = {best.hypothesis.fault.name}
        others = []
        for other in equal:  # one of each fault
            if other.hypothesis.fault.name not in names:
                names.add(other.hypothesis.fault.name)
                others.append(other.hypothesis)
        self._put_in(best)
        sections = {self._section(key) for key in best.explained}
        return Cause(
            name=best.hypothesis.fault.name,
            words=best.hypothesis.words,
            departure=first,
            after=best.hypothesis.residual.rms,
            explained=len(best.explained),
            layers=tuple(sorted(int(s[7:]) for s in sections if s.startswith("layers."))),
            equals=tuple(other.words for other in others),
            convention=best.hypothesis.fault.convention,
        )

    def _unknown(self, first: Residual) -> Cause:
        nearest, after = "", first.rms
        if dropout := self.walk.trace.manifest.get("dropout"):
            words = f"dropout of {dropout} was on"
            return Cause("dropout", words, first, first.rms, 0)
        if self.nearest is not None and _size(self.nearest.residual) < first.rms / 2:
            nearest, after = self.nearest.words, self.nearest.residual.rms
        return Cause(None, "unknown", first, after, 0, nearest=nearest)

    def _can_be(self, fault: Fault, first: Residual) -> bool:
        """Whether a fault can begin at an array."""
        if fault.direction != first.direction:
            return False
        if first.direction == "backward":
            after = self._after(self._section(_key(first)))
            return any(_local(step) in fault.begins for one in after for step in steps_of(one))
        for section in self._before(self._section(_key(first))):
            for step in steps_of(section):
                can_begin = _local(step) in fault.begins
                if step == first.name:
                    return can_begin
                if can_begin and array_of(step) not in self.walk.trace.stored:
                    return True
        return False

    def _tried(self, first: Residual, candidates: Iterable[Fault]) -> Iterator[_Hypothesis]:
        fields, inputs = self.checkpoint.fields, self.walk.inputs
        for fault in candidates:
            for words, change in fault.hypotheses(fields, inputs):
                residual = self._try(change, first)
                if residual is not None:
                    yield _Hypothesis(fault, words, change, residual)

    def _try(self, change: Change, first: Residual) -> Residual | None:
        """The first departure with a change in its section, and in those before that it depends on."""
        section = self._section(_key(first))
        backward = first.direction == "backward"
        sections = self._after(section) if backward else self._before(section)
        try:
            found = self._walked(change, sections, backward)
        except _NO_SENSE:
            return None  # makes no sense in this model
        return found.get(_key(first))

    def _fitted(self, first: Residual, candidates: Iterable[Fault]) -> Iterator[_Hypothesis]:
        is_backward = first.direction == "backward"
        for fault in candidates:
            if fault.family is None or (is_backward and first.name != "lm_head"):
                continue
            family = fault.family(self.checkpoint.fields)
            if not family.values:
                continue
            value = self._fit(first, family)
            if value is None:
                continue
            change = family.change(value)
            residual = self._try(change, first)
            if residual is not None:
                yield _Hypothesis(fault, f"{fault.describe(value)} (fitted)", change, residual)

    def _fit(self, first: Residual, family: Family) -> float | None:
        """The number that explains an array best: Gauss-Newton on its logarithm."""
        error = self._error(first, family)
        try:
            starts = [float(np.log(value)) for value in family.values]
            best = self._descend(error, min(starts, key=lambda start: _norm(error(start))))
            if best is None or _norm(error(best)) > 1e-4 * _norm(error(starts[0])):
                grid = np.linspace(min(starts) - 3.0, max(starts) + 3.0, _GRID)
                best = self._descend(error, float(min(grid, key=lambda at: _norm(error(at)))))
        except _NO_SENSE:
            return None
        inside = best is not None and min(starts) - 5.0 < best < max(starts) + 5.0
        return float(np.exp(best)) if best is not None and inside else None

    def _descend(self, error: Callable[[float], np.ndarray], log: float) -> float:
        for _ in range(20):
            now = error(log)
            slope = (error(log + 1e-5) - error(log - 1e-5)) / 2e-5
            if not _norm(slope) > 0:
                return log
            step = float(np.clip(-np.dot(slope, now) / np.dot(slope, slope), -1.0, 1.0))
            while abs(step) > 1e-12 and not _norm(error(log + step)) < _norm(now):
                step /= 4
            log += step
            if abs(step) < 1e-10:
                break
        return log

    def _error(self, first: Residual, family: Family) -> Callable[[float], np.ndarray]:
        """Of the exact value of an array, by the logarithm of a number; of the loss, of its gradient."""
        gradient = array_of("lm_head", gradient=True)
        of_gradient = first.direction == "backward" or (
            first.name == "loss" and gradient in self.walk.trace.stored
        )
        array = gradient if of_gradient else array_of(first.name)
        recorded = self.walk.trace.read(array).astype(np.float64)
        sections = self._before(self._section(_key(first)))

        def error(log: float) -> np.ndarray:
            walk = self._walk(family.change(float(np.exp(log))), sections)
            if of_gradient:
                values = walk.values("head", 0)
                begin = {"loss": np.ones(()), "lm_head": recorded}
                exact = walk.programs[0].backward("head", values, begin)["lm_head"]
            else:
                steps: dict[str, np.ndarray] = {}
                for section in sections:
                    steps = self._exact(walk, section, steps)
                exact = steps[first.name]
            return (exact - recorded.reshape(-1, *exact.shape[1:])).reshape(-1)

        return error

    def _exact(self, walk: Walk, section: str, before: dict[str, np.ndarray]) -> dict[str, Any]:
        values = dict(walk.values(section, 0))
        needed = input_of(section, len(walk.sections) - 2)
        if needed is not None and needed not in values:
            values[needed] = before[needed]
        if section.startswith("layers.") and COS not in values:
            angles = walk.programs[0].forward("embedding", {})
            values |= {COS: angles[COS], SIN: angles[SIN]}
        return walk.programs[0].forward(section, values)

    def _explains(self, hypothesis: _Hypothesis, first: Residual) -> bool:
        return _is_explained(hypothesis.fault, first, hypothesis.residual)

    def _confirm(self, hypothesis: _Hypothesis) -> _Confirmed:
        """With the fault in all sections that have departures."""
        departing = self._departing()
        sections = self._ordered(
            one for r in departing for s in self._origins(_key(r)) for one in self._before(s)
        )
        backward = any(r.direction == "backward" for r in departing)
        found = self._walked(hypothesis.change, sections, backward)
        explained, broken = set(), 0
        for key, after in found.items():
            before = self.residuals[key]
            if before.departs and key not in self.settled:
                if _is_explained(hypothesis.fault, before, after):
                    explained.add(key)
            elif not before.departs and after.departs:
                broken += 1
        return _Confirmed(hypothesis, found, explained, broken)

    def _put_in(self, confirmed: _Confirmed) -> None:
        self.settled |= confirmed.explained
        for section in {one for key in confirmed.explained for one in self._origins(key)}:
            self.changes.setdefault(section, []).append(confirmed.hypothesis.change)
        for key in confirmed.explained:
            self.residuals[key] = confirmed.residuals[key]
            if confirmed.hypothesis.fault.convention:
                self.agreed[key] = confirmed.residuals[key]

    def _walk(self, change: Change, sections: Iterable[str]) -> Walk:
        changes = dict(self.changes)
        for section in sections:
            changes[section] = [*changes.get(section, []), change]
        wide = self.walk.programs[1]
        is_double = getattr(wide, "dtype", None) == np.float64
        exact, narrow = (
            FaultyOracle(self.checkpoint, self.dtype, self.walk.inputs, changes, working)
            for working in (torch.float64, torch.float64 if is_double else torch.float32)
        )
        return Walk(
            self.walk.trace,
            self.walk.config,
            self.walk.inputs,
            exact,
            Rounded(narrow, self._difference),
        )

    def _walked(self, change: Change, sections: list[str], backward: bool) -> dict[Key, Residual]:
        walk = self._walk(change, sections)
        needed = self._ordered(s for one in sections for s in self._before(one))
        found = list(walk.forward(only=needed))
        if backward:
            needed = self._ordered(s for one in sections for s in self._after(one))
            found += walk.backward(only=needed)
        return {_key(residual): residual for residual in found}

    def _difference(self, way: str, section: str, *arguments: Any) -> dict[str, np.ndarray]:
        """Rounding errors of the right program in a section."""
        if (way, section) not in self._noise:
            if sum(a.nbytes for arrays in self._noise.values() for a in arrays.values()) > _HELD:
                self._noise.clear()
            right = self.walk.programs[0]
            exact = getattr(right, way)(section, *arguments)
            rounded = getattr(self.walk.programs[1], way)(section, *arguments)
            self._noise[way, section] = {
                name: rounded[name].astype(np.float64).reshape(exact[name].shape) - exact[name]
                for name in exact
                if name in rounded
            }
        return self._noise[way, section]

    def _section(self, key: Key) -> str:
        section = _section(key)
        return section if section in self.walk.sections else "head"

    def _origins(self, key: Key) -> list[str]:
        """The sections that compute an array: two, if it is the gradient of a tied embedding."""
        is_tied = key == ("backward", EMBEDDING) and self.checkpoint.head == EMBEDDING
        return [self._section(key), "head"] if is_tied else [self._section(key)]

    def _ordered(self, sections: Iterable[str]) -> list[str]:
        wanted = set(sections)
        return [section for section in self.walk.sections if section in wanted]

    def _before(self, section: str) -> list[str]:
        """A section, and those before it whose hidden states were not recorded."""
        sections = [section]
        while True:
            before = input_of(sections[0], len(self.walk.sections) - 2)
            if before is None or array_of(before) in self.walk.trace.stored:
                return sections
            sections.insert(0, section_of(before))

    def _after(self, section: str) -> list[str]:
        """A section, and those after it that its gradients depend on."""
        stored, all_ = self.walk.trace.stored, self.walk.sections
        sections = [section]
        if section == "embedding" and self.checkpoint.head == EMBEDDING:
            sections.append("head")
        while section != "head" and array_of(output_of(section), gradient=True) not in stored:
            section = all_[all_.index(section) + 1]
            sections.append(section)
        return self._ordered(sections)


def find_causes(
    walk: Walk, checkpoint: Checkpoint, dtype: Any, residuals: Iterable[Residual]
) -> tuple[list[Cause], dict[Key, Residual]]:
    """The causes of a recording's departures, each found with those before it in the oracle.

    Also the residuals by direction and name, with those causes in the oracle that are conventions.

    Args:
        walk: of the trace, with the float64 oracle and what rounds as the recording.
        checkpoint: its weights.
        dtype: of the recorded program's parameters.
        residuals: what the walk has found, forward ones first.
    """
    assert isinstance(walk.programs[0], OracleSections)
    search = Search(walk, checkpoint, dtype, residuals)
    return list(search.causes()), search.agreed


def find_step_cause(
    trace: Trace, checkpoint: Checkpoint, dtype: Any, residuals: Iterable[Residual]
) -> Cause | None:
    """The fault that explains the departures of an optimizer's step; None without any.

    Args:
        dtype: of the parameters.
        residuals: what `step_residuals` has found.
    """
    every = {residual.name: residual for residual in residuals}
    departing = [residual for residual in every.values() if residual.departs]
    if not departing:
        return None
    first, found = departing[0], []

    def walked(rule: Rule, only: Iterable[str]) -> dict[str, Residual]:
        with np.errstate(divide="ignore", invalid="ignore"):  # without eps
            return {r.name: r for r in step_residuals(trace, checkpoint, dtype, rule, {*only})}

    for fault in optimizer.faults():
        after = walked(fault.rule, [first.name])[first.name]
        if after.departs:
            continue
        with_it = walked(fault.rule, every)
        explained = sum(not with_it[residual.name].departs for residual in departing)
        broken = sum(with_it[n].departs for n, r in every.items() if not r.departs)
        found.append((broken - explained, fault, after, explained))
    if not found:
        return Cause(None, "unknown", first, first.rms, 0)
    least = min(left for left, *_ in found)
    (_, fault, after, explained), *equal = (each for each in found if each[0] == least)
    return Cause(
        name=fault.name,
        words=fault.words,
        departure=first,
        after=after.rms,
        explained=explained,
        equals=tuple(each[1].words for each in equal),
    )


def _key(residual: Residual) -> Key:
    return residual.direction, residual.name


def _section(key: Key) -> str:
    """The section that computes an array; that of a hidden state's gradient is the one that reads it."""
    direction, name = key
    section = section_of(_step(name))
    if direction == "forward" or name != output_of(section):
        return section
    return "layers.0" if section == "embedding" else f"layers.{int(section[7:]) + 1}"


def _step(name: str) -> str:
    """The step of a residual: a parameter's is that of its module."""
    if name.endswith((".weight", ".bias")):
        return name.removeprefix("model.").rpartition(".")[0]
    return name


def _local(name: str) -> str:
    """Within its section."""
    step = name.removeprefix("model.")
    return step.removeprefix(section_of(_step(name))).removeprefix(".")


def _size(residual: Residual) -> float:
    return residual.rms if np.isfinite(residual.rms) else np.inf


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.dot(values, values)))


def _is_explained(fault: Fault, before: Residual, after: Residual) -> bool:
    if not after.departs:
        return True
    fall = _FALL if before.direction == fault.direction else _FALL_OF_GRADIENTS
    return fault.rounds and after.rms <= before.rms / fall


def _left(confirmed: _Confirmed) -> int:
    return confirmed.broken - len(confirmed.explained)
