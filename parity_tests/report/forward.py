"""The forward pass of all three programs in step: every module's output, compared when it is there."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity_tests.report.metrics import Compared, compare
from parity_tests.report.programs.program import Program


class Forward(NamedTuple):
    """modules: in forward order. hidden: each program's last hidden states, after the norm."""

    modules: list[Compared]
    hidden: list[Any]


def forward(
    programs: Sequence[Program],
    ids: np.ndarray,
    layers: int,
    unit: float,
    advance: Callable[[], None],
) -> Forward:
    """Run ours, theirs and the oracle, in this order in `programs`, on `ids` [1, T].

    `advance` is called after every layer.
    """
    length, modules = ids.shape[1], []

    def add(name: str, outputs: Sequence[Any]) -> None:
        modules.append(compare(name, *outputs, unit=unit, rows=length))

    def add_steps(prefix: str, steps: Sequence[dict[str, Any]]) -> None:
        for name in list(steps[0]):
            add(f"{prefix}.{name}".rstrip(".").lstrip("."), [of.pop(name) for of in steps])

    def states(values: Sequence[Any]) -> list[Any]:
        return [p.as_torch(x) for p, x in zip(programs, values, strict=True)]

    hidden = [program.embed(ids) for program in programs]
    add("embed_tokens", states(hidden))
    add_steps("", [program.ends() for program in programs])
    for layer in range(layers):
        steps = []
        for index, program in enumerate(programs):
            intermediate, hidden[index] = program.layer(layer, hidden[index])
            steps.append(intermediate)
        add_steps(f"layers.{layer}", steps)
        advance()
    hidden = [program.norm(x) for program, x in zip(programs, hidden, strict=True)]
    add("norm", states(hidden))
    return Forward(modules, hidden)
