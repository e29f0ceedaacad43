"""The float64 oracle's program, one layer at a time."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from parity_tests.reference import oracle
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.program import Gradients, Steps
from parity_tests.report.programs.steps import AFTER_ATTENTION, OUTPUT, Read, as_computed
from parity_tests.report.programs.tensors import as_torch, gradients

_QUERIES = 128  # at a time: float64 scores of a whole sequence would be the largest array of all
_VOCABULARY = 16384  # rows of the head that are float64 at a time


class OracleProgram:
    """The oracle: the checkpoint's weights rounded to `dtype`, everything after that in float64."""

    name = "oracle"

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.fields, self.eps = checkpoint.fields, checkpoint.config.rms_norm_eps

    def mask_and_rotary(self, length: int) -> Steps:
        cos, sin, visible = self._constants(length)
        return {"mask": visible[0, 0], "rotary.cos": cos[0], "rotary.sin": sin[0]}

    def embed(self, ids: np.ndarray) -> Tensor:
        return self._weight(EMBEDDING)[torch.from_numpy(ids)].double()

    @torch.no_grad()
    def layer(self, index: int, hidden: Tensor) -> Steps:
        return self._layer_steps(self._layer_weights(index), hidden.double())

    def norm(self, hidden: Tensor) -> Tensor:
        return oracle.rms_norm(hidden.double(), self._weight(NORM).double(), self.eps)

    def logits(self, hidden: Tensor, block: int) -> Iterator[Tensor]:
        parts = self._weight(self.checkpoint.head).split(_VOCABULARY)
        for rows in hidden[0].double().split(block):
            yield torch.cat([rows @ part.double().T for part in parts], dim=-1)

    def loss(self, hidden: Tensor, ids: np.ndarray) -> float:
        labels = torch.from_numpy(ids)[0, 1:]
        blocks = self.logits(hidden[:, :-1], _QUERIES)
        total = sum(
            float(cross_entropy(logits, targets, reduction="sum"))
            for logits, targets in zip(blocks, labels.split(_QUERIES), strict=True)
        )
        return total / len(labels)

    def head_vjp(self, hidden: Tensor, ids: np.ndarray) -> tuple[Tensor, Gradients]:
        hidden, head = hidden.detach().double().requires_grad_(), self.checkpoint.head
        parameters = _trainable({name: self._weight(name).double() for name in (NORM, head)})
        normed = oracle.rms_norm(hidden, parameters[NORM], self.eps)
        loss = oracle.causal_lm_loss(normed @ parameters[head].T, torch.from_numpy(ids))
        return gradients(loss, hidden, parameters)

    def layer_vjp(self, index: int, hidden: Tensor, cotangent: Tensor) -> tuple[Tensor, Gradients]:
        hidden = hidden.detach().double().requires_grad_()
        parameters = _trainable(self._layer_weights(index))
        output = self._layer_steps(parameters, hidden)[OUTPUT]
        return gradients(output, hidden, parameters, cotangent.double())

    def embed_vjp(self, ids: np.ndarray, cotangent: Tensor) -> Tensor:
        table = self._weight(EMBEDDING).double().requires_grad_()
        rows = oracle.embed(self.fields, table, torch.from_numpy(ids))
        (gradient,) = torch.autograd.grad(rows, table, cotangent.double())
        return gradient

    def _constants(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [1, T, D], and who sees whom, bool [1, 1, T, T]."""
        cos, sin = oracle.cos_sin(self.fields, torch.arange(length)[None])
        return cos, sin, oracle.visibility(1, length)

    def _layer_steps(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Steps:
        return layer_steps(self.fields, weights, hidden, *self._constants(hidden.shape[1]))

    def _weight(self, name: str) -> Tensor:
        return as_torch(read(self.checkpoint, name, self.dtype))

    def _layer_weights(self, index: int) -> dict[str, Tensor]:
        tensors = read_layer(self.checkpoint, index, self.dtype)
        return {name: as_torch(tensors.pop(name)).double() for name in list(tensors)}


def layer_steps(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Tensor,
    read: Read = as_computed,
) -> Steps:
    """Every intermediate of a decoder layer, by `LAYER_STEPS`, in forward order.

    `weights` are the layer's, by their names in it. x [B, T, H]; cos, sin [B, T, D]; `visible`
    [B, 1, T, T] shows nothing beyond the diagonal. Rotated heads are [B, T, heads, D]. `read`: what later
    steps read in place of a step's value.
    """
    batch, length, _ = x.shape
    eps, dim, slices = config["rms_norm_eps"], oracle.head_dim(config), config.get("pretraining_tp")
    steps: Steps = {}

    def step(name: str, value: Tensor) -> Tensor:
        steps[name] = value
        return read(name, value)

    def linear(name: str, x: Tensor, slices: int | None = 1) -> Tensor:
        return step(name, oracle.linear(weights, name, x, slices or 1))

    def norm(name: str, x: Tensor) -> Tensor:
        return step(name, oracle.rms_norm(x, weights[f"{name}.weight"], eps))

    normed = norm("input_layernorm", x)
    q, k, v = (
        linear(f"self_attn.{p}_proj", normed).view(batch, length, -1, dim).transpose(1, 2)
        for p in "qkv"
    )
    q, k = oracle.rotate(q, cos, sin), oracle.rotate(k, cos, sin)
    q, k = (
        step(f"self_attn.rotate.{name}", rotated.transpose(1, 2)).transpose(1, 2)
        for name, rotated in (("q", q), ("k", k))
    )
    mixed = _attention(q, k, v, visible).transpose(1, 2).reshape(batch, length, -1)
    mixed = step("self_attn.attention", mixed)
    x = read(AFTER_ATTENTION, x + linear("self_attn.o_proj", mixed, slices))
    normed = norm("post_attention_layernorm", x)
    gate, up = linear("mlp.gate_proj", normed), linear("mlp.up_proj", normed)
    product = step("mlp.act", oracle.ACTIVATIONS[config["hidden_act"]](gate) * up)
    steps[OUTPUT] = x + linear("mlp.down_proj", product, slices)
    return steps


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """`oracle.attention`, a block of queries at a time, each with the keys up to its own end."""
    blocks = [slice(first, first + _QUERIES) for first in range(0, q.shape[2], _QUERIES)]
    outputs = [
        oracle.attention(
            q[:, :, rows],
            k[:, :, : rows.stop],
            v[:, :, : rows.stop],
            visible[:, :, rows, : rows.stop],
        )[0]
        for rows in blocks
    ]
    return torch.cat(outputs, dim=2)


def _trainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.requires_grad_() for name, weight in weights.items()}
