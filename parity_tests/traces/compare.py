"""Two recordings of one model, array by array: where do they part?

Without the checkpoint nothing tells the exact values, so the errors of all modules before are in every
difference. They grow from module to module, but slowly: rounding multiplies them by a few, a fault by
hundreds. The recordings part at the first array whose difference is `JUMP` times that of any array before
it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.safetensors_read import STORED_DTYPES
from llama_jax.formatting import summarize
from parity_tests.traces.names import INPUTS, array_of, section_of, sections, steps_of
from parity_tests.traces.trace import Trace, open_trace

JUMP = 32.0
_FLOOR = 16.0  # roundings of the coarser dtype that are no jump


class Difference(NamedTuple):
    """Of an array: rms over rows of the difference relative to the second's row, and the largest.

    departs: whether the recordings part here. position: the first one with a jump; None for parameters.
    """

    name: str
    rms: float
    largest: float
    departs: bool
    position: int | None


class Differences(NamedTuple):
    """arrays: in forward, then in backward order. missing: arrays that only one of them has."""

    titles: tuple[str, str]
    findings: list[str]
    arrays: list[Difference]
    missing: list[str]

    @property
    def first(self) -> Difference | None:
        """Where they part."""
        return next((difference for difference in self.arrays if difference.departs), None)

    @property
    def holds(self) -> bool:
        """Whether rounding explains all differences."""
        return self.first is None and not self.findings


def compare(one: Path, other: Path) -> Differences:
    """Compare two traces of the same tokens.

    Raises:
        ValueError: in one line: no trace, other tokens, or arrays of other shapes.
    """
    traces = open_trace(one), open_trace(other)
    first, second = traces
    for name in INPUTS:
        present = all(name in trace.stored for trace in traces)
        if present and not np.array_equal(first.read(name), second.read(name)):
            raise ValueError(
                f"{other}: {name}: not those of {one}: the recordings cannot be compared"
            )
    shapes = [
        f"{name}: {list(stored.shape)} and {list(second.stored[name].shape)}"
        for name, stored in first.stored.items()
        if name in second.stored
        and np.prod(stored.shape, dtype=int) != np.prod(second.stored[name].shape, dtype=int)
    ]
    if shapes:
        title = f"{one} and {other}: {len(shapes)} arrays differ in shape"
        raise ValueError(summarize(title, shapes, limit=3))
    missing = sorted(first.stored.keys() ^ second.stored.keys())
    weights = [trace.manifest["weights"] for trace in traces]
    common = weights[0].keys() & weights[1].keys()
    dtypes = {trace.manifest["precision"].get("parameters") for trace in traces}
    findings: list[str] = []
    different = sorted(name for name in common if weights[0][name] != weights[1][name])
    if len(dtypes) > 1:  # rounding makes them differ
        different = []
    if different:
        findings.append(summarize("weights that differ", different, limit=3))
    arrays = list(_differences(first, second))
    return Differences((str(one), str(other)), findings, arrays, missing)


def _differences(first: Trace, second: Trace) -> Iterator[Difference]:
    """All common arrays, in forward and then in backward order."""
    common = [name for name in first.stored if name in second.stored and name not in INPUTS]
    layers = [int(s.removeprefix("layers.")) for s in map(_section, common) if "layers" in s]
    order = [
        step for section in sections(1 + max(layers, default=-1)) for step in steps_of(section)
    ]
    forward = [array_of(step) for step in order if array_of(step) in common]
    batch_rows = int(np.prod(first.stored["input_ids"].shape))
    ids, largest = first.stored["input_ids"].shape, 0.0
    for name in forward:
        difference, largest = _difference(first, second, name, largest, batch_rows, ids[1])
        yield difference
    backward = []
    for step in reversed(order):
        gradient = array_of(step, gradient=True)
        module = array_of(step).rpartition(".")[0]
        names = (gradient, f"{module}.bias.grad", f"{module}.weight.grad")
        backward += [n for n in names if n in common and n not in forward and n not in backward]
    for name in backward:
        rows = batch_rows if name.endswith("_grad") else 0
        difference, largest = _difference(first, second, name, largest, rows, ids[1])
        yield difference


def _section(array: str) -> str:
    return section_of(array.removeprefix("model."))


def _difference(
    first: Trace, second: Trace, name: str, before: float, rows: int, length: int
) -> tuple[Difference, float]:
    """The difference of an array, and the largest up to it. `rows`: of positions; 0 for parameters."""
    shape = first.stored[name].shape
    count = rows or (shape[0] if len(shape) > 1 else 1)
    count = 1 if name == "loss" else count
    one, other = (t.read(name).astype(np.float64).reshape(count, -1) for t in (first, second))
    size = np.sqrt(np.mean(np.square(other), axis=1))
    middling = np.median(size[size > 0]) if (size > 0).any() else 1.0
    error = np.sqrt(np.mean(np.square(one - other), axis=1)) / np.hypot(size, middling)
    rms = float(np.sqrt(np.mean(np.square(error))))
    eps = max(
        float(ml_dtypes.finfo(STORED_DTYPES[t.stored[name].dtype]).eps) for t in (first, second)
    )
    allowed = max(JUMP * before, _FLOOR * eps)
    departs = not rms <= allowed
    beyond = np.flatnonzero(~(error <= allowed))
    position = int(beyond[0]) % length if departs and rows and count > 1 and beyond.size else None
    return Difference(name, rms, float(error.max()), departs, position), max(before, rms)
