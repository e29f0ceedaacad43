"""Mistakes in the backward pass alone: all values are right."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.change import Change, Family, Fault, in_bfloat16, one, several
from parity_tests.faults.norms import NORMS
from parity_tests.faults.rotary import ROTATED


class _Gradient(torch.autograd.Function):
    """The same value; the gradient is changed by a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def with_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x, whose gradient is changed."""
    return _Gradient.apply(x, change)


def _loss_times(factor: float) -> Change:
    return Change(steps={"loss": lambda _, loss: with_gradient(loss, lambda g: g * factor)})


def _turned_forward(right: Any) -> Any:
    """The gradient is rotated by cos and sin, not by their transpose."""

    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        backwards = right(x, cos, -sin)
        return right(x, cos, sin).detach() + (backwards - backwards.detach())

    return wrong


def _scale_detached(_: Any) -> Any:
    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps).detach() * weight

    return wrong


def _softmax_detached(right: Any) -> Any:
    def wrong(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Any:
        return right(q.detach(), k.detach(), v, visible)

    return wrong


def _mean_of_group(right: Any) -> Any:
    """Keys and values get the mean of their query heads' gradients, not the sum."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Any:
        group = q.shape[1] // k.shape[1]
        k, v = (with_gradient(x, lambda g: g / group) for x in (k, v))
        return right(q, k, v, visible)

    return wrong


FAULTS: list[Fault] = [
    Fault(
        "gradient_scale",
        "all gradients are multiplied by {}",
        ("lm_head", "norm"),
        lambda _, inputs: [
            ("the number of tokens", _loss_times(float(inputs.ids.size))),
            ("the number of rows", _loss_times(float(len(inputs.ids)))),
            ("1 / the number of rows", _loss_times(1 / len(inputs.ids))),
        ],
        lambda _: Family((0.5, 2.0, 0.25, 4.0, 0.125, 8.0, 1024.0, 65536.0), _loss_times),
        direction="backward",
    ),
    one(
        "rotation_not_transposed",
        "the backward pass rotates forward",
        ("self_attn.q_proj", "self_attn.k_proj"),
        Change(functions={"rotate": _turned_forward}),
        direction="backward",
    ),
    one(
        "norm_scale_detached",
        "norms have no gradient through their mean of squares",
        NORMS,
        Change(functions={"rms_norm": _scale_detached}),
        direction="backward",
    ),
    one(
        "softmax_detached",
        "the softmax of attention has no gradient",
        ROTATED,
        Change(functions={"attention": _softmax_detached}),
        direction="backward",
    ),
    one(
        "kv_gradient_mean",
        "key/value heads get the mean of their query heads' gradients, not the sum",
        (*ROTATED, "self_attn.v_proj"),
        Change(functions={"attention": _mean_of_group}),
        direction="backward",
    ),
    several(
        "gradient_bfloat16",
        "gradients of {} are in bfloat16",
        ("lm_head", "norm", "self_attn.attention", "mlp.act"),
        {
            "logits": Change(steps={"lm_head": lambda _, x: with_gradient(x, in_bfloat16)}),
            "weights and inputs of projections": Change(
                functions={"linear": lambda right: lambda *a: with_gradient(right(*a), in_bfloat16)}
            ),
        },
        rounds=True,
        direction="backward",
    ),
]
