"""The oracle with faults in some of its sections."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from parity_tests.faults.change import Change, Steps, Weights
from parity_tests.reference import oracle
from parity_tests.report.programs import oracle_layers
from parity_tests.report.programs.checkpoint import Checkpoint
from parity_tests.traces.names import COS, SIN, input_of
from parity_tests.traces.oracle_sections import OracleSections
from parity_tests.traces.sections import Inputs, Values

Changes = Mapping[str, Sequence[Change]]
"""By section; those of one section are made one after the other."""


class FaultyOracle:
    """`OracleSections` with changes; see there for the arguments."""

    name = "float64 oracle with a fault"

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: np.dtype,
        inputs: Inputs,
        changes: Changes,
        working: torch.dtype = torch.float64,
    ) -> None:
        self.arguments = checkpoint, dtype, inputs, working
        self.changes = changes

    def forward(self, section: str, values: Values) -> dict[str, np.ndarray]:
        with self._changed(section) as sections:
            return sections.forward(section, sections.with_angles(section, values))

    def backward(self, section: str, values: Values, cotangents: Values) -> dict[str, np.ndarray]:
        with self._changed(section) as sections:
            values = sections.with_angles(section, values)
            return sections.backward(section, values, cotangents)

    @contextmanager
    def _changed(self, section: str) -> Iterator["_Changed"]:
        checkpoint, dtype, inputs, working = self.arguments
        changes = self.changes.get(section, ())
        with ExitStack() as stack:
            for change in changes:
                inputs = change.inputs(inputs)
                for name, replacement in change.functions.items():
                    wrong = replacement(getattr(oracle, name))
                    stack.enter_context(mock.patch.object(oracle, name, wrong))
                if change.future:  # a block of queries has no keys after its end
                    length = inputs.ids.shape[1]
                    stack.enter_context(mock.patch.object(oracle_layers, "_QUERIES", length))
            sections = _Changed(checkpoint, dtype, inputs, working)
            sections.changes, sections.section = changes, section
            for change in changes:
                sections.fields = change.fields(sections.fields)
            yield sections


class _Changed(OracleSections):
    """One section, within patches of the oracle's functions."""

    changes: Sequence[Change] = ()
    section = ""

    def with_angles(self, section: str, values: Values) -> Values:
        """With the rotary angles of a fault that other than the recorded ones."""
        if not section.startswith("layers.") or not any(c.angles for c in self.changes):
            return values
        positions = torch.from_numpy(self.inputs.positions)
        cos, sin = oracle.cos_sin(self.fields, positions, self.working)
        return dict(values) | {COS: cos.numpy(), SIN: sin.numpy()}

    def weights(self, section: str) -> Weights:
        weights = super().weights(section)
        for change in self.changes:
            weights = change.weights(weights, self.fields, self.weight)
        prefix = f"model.{section}."
        self.steps = Steps(self.fields, {n.removeprefix(prefix): w for n, w in weights.items()}, {})
        return weights

    def computed(self, step: str, value: Tensor) -> Tensor:
        for change in self.changes:
            function = change.steps.get(self._short(step))
            if function is not None:
                value = function(self.steps, value)
        return value

    def has_read(self, step: str, value: Tensor) -> None:
        before = input_of(self.section, self.layers)
        name = "x" if step == before else self._short(step)
        self.steps.read[name] = value  # type: ignore[index]

    def _short(self, step: str) -> str:
        return step.removeprefix(self.section).removeprefix(".")


class Rounded:
    """A faulty program that rounds as the recorded one is expected to: the faulty oracle in float32, and
    the difference that the precision of the recording makes to the right program.

    Args:
        narrow: the faulty oracle in float32, or in float64 for a recording in float64.
        difference: of the rounded and the exact right program in a section, from the same arguments.
    """

    name = "rounded"

    def __init__(self, narrow: FaultyOracle, difference: Callable[..., dict[str, Any]]) -> None:
        self.narrow, self.difference = narrow, difference

    def forward(self, section: str, values: Values) -> dict[str, np.ndarray]:
        steps = self.narrow.forward(section, values)
        noise = self.difference("forward", section, values)
        return _added(steps, noise)

    def backward(self, section: str, values: Values, cotangents: Values) -> dict[str, np.ndarray]:
        steps = self.narrow.backward(section, values, cotangents)
        noise = self.difference("backward", section, values, cotangents)
        return _added(steps, noise)


def _added(steps: dict[str, np.ndarray], noise: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums of arrays; rotary angles may be of every row, or one for all."""
    sums = {}
    for name in steps.keys() & noise.keys():
        value, error = steps[name], noise[name]
        sums[name] = value + (error.reshape(value.shape) if error.size == value.size else error)
    return sums
