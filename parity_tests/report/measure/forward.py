"""The forward pass of all three programs in step: every module's output is compared as it is computed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from parity_tests.report.measure.errors import compare
from parity_tests.report.measure.metrics import Comparison
from parity_tests.report.programs.program import Programs, Steps
from parity_tests.report.programs.steps import OUTPUT


class Forward(NamedTuple):
    """modules: in forward order. hidden: each program's last hidden states [1, T, H], after the norm."""

    modules: list[Comparison]
    hidden: list[Tensor]


def forward(
    programs: Programs,
    ids: np.ndarray,
    layers: int,
    eps: float,
    advance: Callable[[], None],
) -> Forward:
    """Run all three on `ids`, int64 [1, T]. `advance` is called after every layer."""
    length, modules = ids.shape[1], []

    def add(name: str, outputs: Sequence[Tensor]) -> None:
        modules.append(compare(name, *outputs, eps=eps, rows=length))

    def add_steps(prefix: str, steps: Sequence[Steps]) -> None:
        for name in list(steps[-1]):
            if all(name in of_program for of_program in steps):
                outputs = [of_program.pop(name) for of_program in steps]
                add(f"{prefix}.{name}".strip("."), outputs)

    hidden = [program.embed(ids) for program in programs]
    add("embed_tokens", hidden)
    add_steps("", [program.mask_and_rotary(length) for program in programs])
    for layer in range(layers):
        steps = [program.layer(layer, x) for program, x in zip(programs, hidden, strict=True)]
        hidden = [of_program[OUTPUT] for of_program in steps]
        add_steps(f"layers.{layer}", steps)
        advance()
    hidden = [program.norm(x) for program, x in zip(programs, hidden, strict=True)]
    add("norm", hidden)
    return Forward(modules, hidden)
