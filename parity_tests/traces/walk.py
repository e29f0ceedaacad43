"""Every recorded array against its exact value, one section of the model at a time."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from llama_jax import LlamaConfig
from llama_jax.checkpoints.safetensors_read import STORED_DTYPES
from parity_tests.report.programs.checkpoint import EMBEDDING
from parity_tests.traces.names import (
    COS,
    SIN,
    array_of,
    input_of,
    output_of,
    section_of,
    sections,
    steps_of,
)
from parity_tests.traces.residuals import Residual, residual
from parity_tests.traces.sections import Inputs, Sections
from parity_tests.traces.trace import Trace

# of log-probabilities, which are about -10 to -30, where a program takes their exponential
_LOSS_ROUNDINGS = 32
_SCORED = ("rotate.q", "rotate.k", "q_proj", "k_proj")
_HEADS = ("q_proj", "k_proj", "v_proj", "rotate.q", "rotate.k", "attention")

Pair = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""Arrays of the exact and of the rounded program."""


def _nothing() -> None:
    pass


class Walk:
    """What is compared with what.

    Args:
        trace: the recording.
        config: of the checkpoint.
        inputs: what the recorded model was called with.
        exact: the reference.
        rounded: a program whose rounding errors are what is to be expected of the recorded one.
    """

    def __init__(
        self, trace: Trace, config: LlamaConfig, inputs: Inputs, exact: Sections, rounded: Sections
    ) -> None:
        self.trace, self.config, self.inputs = trace, config, inputs
        self.programs = exact, rounded
        self.sections = sections(config.num_hidden_layers)
        self._carried: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # what later sections read

    def forward(
        self, only: Iterable[str] | None = None, advance: Callable[[], None] = _nothing
    ) -> Iterator[Residual]:
        """Residuals of values, in forward order.

        Args:
            only: the sections to run; default: all. Hidden states that they read have to be recorded.
            advance: called after every section.
        """
        for section in self.sections if only is None else only:
            is_known = COS in self._carried or array_of(COS) in self.trace.stored
            if only is not None and section != "embedding" and not is_known:
                self._carry("embedding", self._run("embedding"))  # of which all read the angles
            exact, rounded = self._run(section)
            for step in steps_of(section):
                if array_of(step) in self.trace.stored:
                    values = exact[step], rounded[step]
                    yield self._residual(step, "forward", array_of(step), *values)
            self._carry(section, (exact, rounded))
            advance()

    def backward(
        self, only: Iterable[str] | None = None, advance: Callable[[], None] = _nothing
    ) -> Iterator[Residual]:
        """Residuals of gradients, in backward order; `forward` has to run first.

        Args:
            only: as in `forward`; the gradients of what these sections return have to be recorded.
        """
        one = np.ones(())
        carried: Pair = ({}, {})
        of_head: list[np.ndarray] = []
        for section in reversed(self.sections):
            if only is not None and section not in only:
                continue
            if section == "head":
                carried = ({"loss": one}, {"loss": one})
            recorded = self._recorded(steps_of(section), gradient=True)
            if output_of(section) not in carried[0]:  # of a section that was left out
                carried = ({}, {})
            exact, rounded = (
                program.backward(section, self.values(section, index), carried[index] | recorded)
                for index, program in enumerate(self.programs)
            )
            if section == "head" and EMBEDDING in exact:  # tied: it is the head's weight too
                of_head = [exact.pop(EMBEDDING), rounded.pop(EMBEDDING)]
            if section == "embedding" and of_head:
                exact[EMBEDDING] = exact[EMBEDDING] + of_head[0]
                rounded[EMBEDDING] = rounded[EMBEDDING] + of_head[1]
            before = input_of(section, len(self.sections) - 2)
            steps = [*reversed(steps_of(section)), *([] if before is None else [before])]
            for step in steps:
                array = array_of(step, gradient=True)
                if step in exact and array in self.trace.stored and step != "loss":
                    values = exact[step], rounded[step]
                    yield self._residual(step, "backward", array, *values)
                module, _, side = array_of(step).rpartition(".")
                for leaf in ("bias", "weight") if side == "output" else ():
                    name = f"{module}.{leaf}"
                    if name in exact and f"{name}.grad" in self.trace.stored:
                        gradients = exact[name], rounded[name]
                        yield self._residual(name, "backward", f"{name}.grad", *gradients)
            if before is not None:
                carried = ({before: exact[before]}, {before: rounded[before]})
            advance()

    def _run(self, section: str) -> Pair:
        exact, rounded = (
            program.forward(section, self.values(section, index))
            for index, program in enumerate(self.programs)
        )
        return exact, rounded

    def values(self, section: str, program: int) -> dict[str, np.ndarray]:
        """What a program reads in a section: what was recorded, or else what it has computed."""
        before = input_of(section, len(self.sections) - 2)
        if before is None:
            return {}
        values = {name: pair[program] for name, pair in self._carried.items()}
        read = {name: values[name] for name in (before, COS, SIN) if name in values}
        return read | self._recorded([before, COS, SIN, *steps_of(section)])

    def _carry(self, section: str, steps: Pair) -> None:
        for name in (output_of(section), COS, SIN):
            if name in steps[0] and array_of(name) not in self.trace.stored:
                self._carried[name] = steps[0][name], steps[1][name]

    def _recorded(self, steps: Iterable[str], *, gradient: bool = False) -> dict[str, np.ndarray]:
        without = ("loss", COS, SIN) if gradient else ("loss",)
        names = {s: array_of(s, gradient=gradient) for s in steps if s not in without}
        return {
            step: self.trace.read(array)
            for step, array in names.items()
            if array in self.trace.stored
        }

    def _residual(
        self, name: str, direction: str, array: str, exact: np.ndarray, rounded: np.ndarray
    ) -> Residual:
        recorded = self.trace.read(array)
        if name in (COS, SIN):  # of all rows, or one for all
            recorded, exact, rounded = np.broadcast_arrays(recorded, exact, rounded)
        eps = float(ml_dtypes.finfo(STORED_DTYPES[self.trace.stored[array].dtype]).eps)
        compare = partial(residual, name, direction, recorded, exact, rounded)
        tokens = self.inputs.ids.size
        if name == "loss":
            return compare(eps=max(_LOSS_ROUNDINGS * eps, self._rounded_logits(exact)), rows=1)
        if name.endswith((".weight", ".bias")):
            counted, pad = None, self.config.pad_token_id
            if name == EMBEDDING and pad is not None:  # whether it has a gradient is a convention
                counted = np.arange(len(exact)) != pad % len(exact)
            if exact.ndim == 1 or name == EMBEDDING:  # a sum, over tokens, of any order
                eps *= max(1.0, tokens**0.5 / 4)
            rows = len(exact) if exact.ndim > 1 else 1
            return compare(eps=eps, rows=rows, counted=counted)
        least = 0.0
        if direction == "backward" and name.endswith(_SCORED):
            least = self._size_of_scores(name)
        if name == "lm_head" and direction == "backward":
            eps *= _LOSS_ROUNDINGS
            # p - 1 of a likely token: the difference is small, its terms are not
            least = 1 / tokens / exact.shape[-1] ** 0.5
        rows = exact.shape[0] * exact.shape[1]
        mask = self.inputs.attention_mask
        counted = None if mask is None or rows != mask.size else mask.reshape(-1).astype(bool)
        heads = 0
        if name.endswith(_HEADS):
            heads = exact[0, 0].size // self.config.head_size
        return compare(eps=eps, rows=rows, counted=counted, heads=heads, least=least)

    def _size_of_scores(self, name: str) -> float:
        """About the rms of the terms that the gradient of queries and keys is a sum of.

        They cancel if all values that a query sees are alike, and leave nothing but their rounding.
        """
        layer = section_of(name)
        other = "k" if name.endswith(("q", "q_proj")) else "q"
        steps = {f"{layer}.self_attn.attention": True, f"{layer}.self_attn.v_proj": False}
        arrays = [array_of(step, gradient=is_gradient) for step, is_gradient in steps.items()]
        arrays.append(array_of(f"{layer}.self_attn.{other}_proj"))
        sizes = [
            float(np.sqrt(np.mean(np.square(self.trace.read(array), dtype=np.float64))))
            for array in arrays
            if array in self.trace.stored
        ]
        return float(np.prod(sizes)) if len(sizes) == len(arrays) else 0.0

    def _rounded_logits(self, loss: np.ndarray) -> float:
        """The relative change of the loss, as an eps, if it is not computed from rounded logits.

        Each token's loss changes by about a rounding of its logits; their mean by less.
        """
        array = array_of("lm_head")
        if array not in self.trace.stored:
            return 0.0
        logits = self.trace.read(array)
        eps = float(ml_dtypes.finfo(logits.dtype).eps)
        size = float(np.sqrt(np.mean(np.square(logits, dtype=np.float64))))
        return eps * size / (abs(float(loss)) * self.inputs.ids.size**0.5)
