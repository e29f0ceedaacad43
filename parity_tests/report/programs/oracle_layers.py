"""The float64 oracle, a layer at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from parity_tests.reference import oracle
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.program import Program, Steps, as_torch

_QUERIES = 128  # at a time: float64 scores of a whole sequence are the largest thing there is
_VOCABULARY = 16384  # rows of the head that are float64 at a time


def program(checkpoint: Checkpoint, dtype: Any, length: int) -> Program:
    """The oracle on the checkpoint's weights as they are in `dtype`, everything after in float64."""
    fields, eps = checkpoint.fields, checkpoint.config.rms_norm_eps
    cos, sin = oracle.cos_sin(fields, torch.arange(length)[None])
    visible = oracle.visibility(1, length)

    def weight(name: str) -> Tensor:
        return as_torch(read(checkpoint, name, dtype))

    def layer_weights(layer: int) -> dict[str, Tensor]:
        tensors = read_layer(checkpoint, layer, dtype)
        return {name: as_torch(tensors.pop(name)).double() for name in list(tensors)}

    def ends() -> Steps:
        return {"mask": visible[0, 0], "rotary.cos": cos[0], "rotary.sin": sin[0]}

    def embed(ids: np.ndarray) -> Tensor:
        return weight(EMBEDDING)[torch.from_numpy(ids)].double()

    def layer(index: int, x: Tensor) -> tuple[Steps, Tensor]:
        with torch.no_grad():
            steps = layer_steps(fields, layer_weights(index), x, cos, sin, visible)
        return steps, steps[""]

    def norm(x: Tensor) -> Tensor:
        return oracle.rms_norm(x, weight(NORM).double(), eps)

    def head() -> Callable[[Tensor, int, int], Tensor]:
        parts = weight(checkpoint.head).split(_VOCABULARY)

        def logits(hidden: Tensor, first: int, last: int) -> Tensor:
            rows = hidden[0, first:last]
            return torch.cat([rows @ part.double().T for part in parts], dim=-1)

        return logits

    def loss(hidden: Tensor, ids: np.ndarray) -> float:
        labels, total, logits = torch.from_numpy(ids)[0], 0.0, head()
        last = len(labels) - 1
        for first in range(0, last, _QUERIES):
            until = min(first + _QUERIES, last)
            scores = logits(hidden, first, until)
            total += float(cross_entropy(scores, labels[first + 1 : until + 1], reduction="sum"))
        return total / last

    def head_vjp(x: Tensor, ids: np.ndarray) -> tuple[Tensor, Steps]:
        parameters = {name: weight(name).double() for name in (NORM, checkpoint.head)}
        x, parameters = x.detach().requires_grad_(), _trainable(parameters)
        hidden = oracle.rms_norm(x, parameters[NORM], eps)
        value = oracle.causal_lm_loss(hidden @ parameters[checkpoint.head].T, torch.from_numpy(ids))
        return gradients(value, x, parameters, None)

    def layer_vjp(index: int, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Steps]:
        x, parameters = x.detach().requires_grad_(), _trainable(layer_weights(index))
        out = layer_steps(fields, parameters, x, cos, sin, visible)[""]
        return gradients(out, x, parameters, cotangent)

    def embed_vjp(ids: np.ndarray, cotangent: Tensor, head: Tensor | None) -> Tensor:
        table = weight(EMBEDDING).double().requires_grad_()
        rows = oracle.embed(fields, table, torch.from_numpy(ids))
        (gradient,) = torch.autograd.grad(rows, table, cotangent)
        return gradient if head is None else gradient + head

    return Program(
        "oracle",
        ends,
        embed,
        layer,
        norm,
        head,
        loss,
        head_vjp,
        layer_vjp,
        embed_vjp,
        lambda x: x,
        torch.Tensor.double,
    )


def layer_steps(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Tensor,
) -> Steps:
    """Every intermediate of a decoder layer, by `LAYER_STEPS`, in forward order.

    `weights` are the layer's, by their names within it. x [B, T, H]; cos, sin [B, T, D]; visible
    [B, 1, T, T] shows nothing beyond the diagonal. Rotated heads are [B, T, heads, D].
    """
    batch, length, _ = x.shape
    eps, dim, slices = config["rms_norm_eps"], oracle.head_dim(config), config.get("pretraining_tp")
    steps: Steps = {}

    def linear(name: str, x: Tensor, slices: int | None = 1) -> Tensor:
        steps[name] = oracle.linear(weights, name, x, slices or 1)
        return steps[name]

    def norm(name: str, x: Tensor) -> Tensor:
        steps[name] = oracle.rms_norm(x, weights[f"{name}.weight"], eps)
        return steps[name]

    normed = norm("input_layernorm", x)
    q, k, v = (
        linear(f"self_attn.{p}_proj", normed).view(batch, length, -1, dim).transpose(1, 2)
        for p in "qkv"
    )
    q, k = oracle.rotate(q, cos, sin), oracle.rotate(k, cos, sin)
    for name, rotated in (("q", q), ("k", k)):
        steps[f"self_attn.rotate.{name}"] = rotated.transpose(1, 2)
    mixed = _attention(q, k, v, visible).transpose(1, 2).reshape(batch, length, -1)
    steps["self_attn.attention"] = mixed
    x = x + linear("self_attn.o_proj", mixed, slices)
    normed = norm("post_attention_layernorm", x)
    gate, up = linear("mlp.gate_proj", normed), linear("mlp.up_proj", normed)
    steps["mlp.act"] = oracle.ACTIVATIONS[config["hidden_act"]](gate) * up
    steps[""] = x + linear("mlp.down_proj", steps["mlp.act"], slices)
    return steps


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """`oracle.attention` a block of queries at a time, each with the keys up to its own end."""
    ends = [slice(first, first + _QUERIES) for first in range(0, q.shape[2], _QUERIES)]
    blocks = [
        oracle.attention(
            q[:, :, rows],
            k[:, :, : rows.stop],
            v[:, :, : rows.stop],
            visible[:, :, rows, : rows.stop],
        )[0]
        for rows in ends
    ]
    return torch.cat(blocks, dim=2)


def gradients(
    out: Tensor, x: Tensor, parameters: Mapping[str, Tensor], cotangent: Tensor | None
) -> tuple[Tensor, Steps]:
    """Of `out` with its cotangent: with respect to x, and to every parameter by name."""
    wanted = [x, *parameters.values()]
    of_x, *rest = torch.autograd.grad(out, wanted, cotangent)
    return of_x, dict(zip(parameters, rest, strict=True))


def _trainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.requires_grad_() for name, weight in weights.items()}
