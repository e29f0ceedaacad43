"""The float64 oracle, one section at a time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.reference import oracle
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.oracle_layers import layer_steps
from parity_tests.report.programs.steps import OUTPUT
from parity_tests.report.programs.tensors import as_torch
from parity_tests.traces.names import COS, SIN, input_of, output_of
from parity_tests.traces.sections import Inputs, Values

_Tensors = dict[str, Tensor]


class OracleSections:
    """The checkpoint's weights rounded to `dtype`, everything after that in `working`."""

    name = "float64 oracle"

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: np.dtype,
        inputs: Inputs,
        working: torch.dtype = torch.float64,
    ) -> None:
        self.checkpoint, self.dtype, self.inputs = checkpoint, dtype, inputs
        self.working = working
        self.fields, self.layers = checkpoint.fields, checkpoint.config.num_hidden_layers
        self.visible = oracle.visibility(
            inputs.ids.shape[0],
            inputs.ids.shape[1],
            _optional(inputs.attention_mask),
            _optional(inputs.segment_ids),
        )

    def weights(self, section: str) -> _Tensors:
        """The parameters of a section by their names in the checkpoint."""
        if section == "embedding":
            names = [EMBEDDING]
        elif section == "head":
            names = [NORM, self.checkpoint.head]
        else:
            layer = read_layer(self.checkpoint, int(section.removeprefix("layers.")), self.dtype)
            prefix = f"model.{section}."
            return {prefix + n: as_torch(layer.pop(n)).to(self.working) for n in list(layer)}
        return {name: self.weight(name) for name in names}

    def weight(self, name: str) -> Tensor:
        """A parameter of the checkpoint."""
        return as_torch(read(self.checkpoint, name, self.dtype)).to(self.working)

    def computed(self, step: str, value: Tensor) -> Tensor:
        """What a step computes; a place to change it."""
        return value

    def has_read(self, step: str, value: Tensor) -> None:
        """Called with what later steps read of a step."""

    def forward(self, section: str, values: Values) -> dict[str, np.ndarray]:
        with torch.no_grad():
            steps = self._run(section, self.weights(section), self._tensors(values), {})
        return {name: value.numpy() for name, value in steps.items()}

    def backward(self, section: str, values: Values, cotangents: Values) -> dict[str, np.ndarray]:
        tensors, begin = self._tensors(values), self._tensors(cotangents)
        inner = [name for name in begin if name != output_of(section)]
        shifts = {name: torch.zeros_like(begin[name]).requires_grad_() for name in inner}
        hidden = input_of(section, self.layers)
        if hidden is not None:
            shifts[hidden] = torch.zeros_like(tensors[hidden]).requires_grad_()
        weights = {name: w.requires_grad_() for name, w in self.weights(section).items()}
        steps = self._run(section, weights, tensors, shifts)
        wanted = shifts | weights
        gradients = torch.autograd.grad(
            [steps[name] for name in begin],
            list(wanted.values()),
            [begin[name].reshape(steps[name].shape) for name in begin],
            materialize_grads=True,
        )
        return {name: g.numpy() for name, g in zip(wanted, gradients, strict=True)}

    def _run(self, section: str, weights: _Tensors, values: _Tensors, shifts: _Tensors) -> _Tensors:
        """Every step of a section. `shifts` are zeros that are added to steps, to get their gradients."""

        def read(step: str, value: Tensor) -> Tensor:
            if step in shifts:
                value = values.get(step, value).detach().reshape(value.shape) + shifts[step]
            elif step in values:  # its gradient flows on to what computed it
                value = values[step].reshape(value.shape) + (value - value.detach())
            self.has_read(step, value)
            return value

        ids = torch.from_numpy(self.inputs.ids.astype(np.int64))
        if section == "embedding":
            positions = torch.from_numpy(self.inputs.positions)
            cos, sin = oracle.cos_sin(self.fields, positions, self.working)
            embedded = oracle.embed(self.fields, weights[EMBEDDING], ids)
            return {"embed_tokens": self.computed("embed_tokens", embedded), COS: cos, SIN: sin}
        before = input_of(section, self.layers)
        assert before is not None
        x = read(before, values[before])
        if section == "head":
            return self._head(weights, x, read)
        prefix = f"model.{section}."
        steps: _Tensors = {}

        def read_step(name: str, value: Tensor) -> Tensor:
            name = f"{section}.{name}"
            steps[name] = value = self.computed(name, value)
            return read(name, value)

        of_layer = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        batch = len(ids)
        cos, sin = (values[name].expand(batch, -1, -1) for name in (COS, SIN))
        output = layer_steps(self.fields, of_layer, x, cos, sin, self.visible, read_step)[OUTPUT]
        return steps | {section: self.computed(section, output)}

    def _head(self, weights: _Tensors, x: Tensor, read: Any) -> _Tensors:
        steps: _Tensors = {}

        def step(name: str, value: Tensor) -> Tensor:
            steps[name] = value = self.computed(name, value)
            return read(name, value)

        normed = step("norm", oracle.rms_norm(x, weights[NORM], self.fields["rms_norm_eps"]))
        logits = step("lm_head", normed @ weights[self.checkpoint.head].T)
        labels = torch.from_numpy(self.inputs.targets)
        steps["loss"] = self.computed(
            "loss", oracle.causal_lm_loss(logits, labels, self.inputs.num_items)
        )
        return steps

    def _tensors(self, values: Values) -> _Tensors:
        return {
            name: as_torch(np.ascontiguousarray(value)).to(self.working)
            for name, value in values.items()
        }


def _optional(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array.astype(np.int64))
