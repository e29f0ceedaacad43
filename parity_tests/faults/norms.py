"""Mistakes in RMSNorm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.change import (
    Change,
    Config,
    Fault,
    Steps,
    Weights,
    in_halves,
    of_number,
    one,
    rounded_to,
    several,
)
from parity_tests.reference.oracle import rms_norm
from parity_tests.report.programs.checkpoint import NORM

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def instead(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Change:
    """Another function in place of RMSNorm."""
    return Change(functions={"rms_norm": lambda _: norm})


def _rsqrt_mean(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def _all_in(dtype: torch.dtype) -> Callable[[Tensor, Tensor, float], Tensor]:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        narrow = x.to(dtype)
        scale = torch.rsqrt(narrow.pow(2).mean(-1, keepdim=True) + eps)
        return (narrow * scale * weight.to(dtype)).to(x.dtype)

    return norm


def _over(*axes: int) -> Change:
    """The mean of squares is over these axes of [B, T, H]."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps) * weight

    return instead(norm)


def _by(scale: Callable[[Tensor, float], Tensor]) -> Change:
    """The norm divides by a function of its input and eps."""
    return instead(lambda x, w, eps: x / scale(x, eps) * w)


def _of_layers_norm(name: str) -> Change:
    """The final norm has the weight of one of the last layer's."""

    def weights(weights: Weights, fields: Config, read: Callable[[str], Tensor]) -> Weights:
        last = fields["num_hidden_layers"] - 1
        other = f"model.layers.{last}.{name}.weight"
        return weights | {NORM: read(other)} if NORM in weights else weights

    return Change(weights=weights)


def _swapped(weights: Weights, *_: Any) -> Weights:
    names = [name for name in weights if name.endswith("_layernorm.weight")]
    values = [weights[name] for name in reversed(names)]
    return weights | dict(zip(names, values, strict=True))


def _post_norm() -> Change:
    """Each norm is applied to what attention or the MLP returns, and not to what they read."""

    def linear(name: str) -> Callable[[Steps, Tensor], Tensor]:
        def step(steps: Steps, value: Tensor) -> Tensor:
            x = steps.read["x" if name.startswith("self_attn") else "after_attention"]
            y = x @ steps.weights[f"{name}.weight"].T
            bias = steps.weights.get(f"{name}.bias")
            return y.reshape(value.shape) if bias is None else y.reshape(value.shape) + bias

        return step

    def norm(name: str, of: str) -> Callable[[Steps, Tensor], Tensor]:
        def step(steps: Steps, value: Tensor) -> Tensor:
            if of not in steps.read:
                return value
            weight, eps = steps.weights[f"{name}.weight"], steps.fields["rms_norm_eps"]
            return rms_norm(steps.read[of], weight, eps)

        return step

    projections = [*(f"self_attn.{p}_proj" for p in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    return Change(
        steps={
            "input_layernorm": norm("input_layernorm", "self_attn.o_proj"),
            "post_attention_layernorm": norm("post_attention_layernorm", "mlp.down_proj"),
            "after_attention": lambda s, v: s.read["x"] + s.read["input_layernorm"],
            "": lambda s, v: s.read["after_attention"] + s.read["post_attention_layernorm"],
        }
        | {name: linear(name) for name in projections}
    )


def _eps(value: float) -> Change:
    return Change(fields=lambda fields: dict(fields) | {"rms_norm_eps": value})


def _eps_values(fields: Config) -> list[float]:
    values = (1e-5, 1e-6, 1e-8, 1e-12, 1e-4, 1e-3, 1.1920929e-7)
    return [value for value in values if value != fields["rms_norm_eps"]]


def _norm_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"norm_{half}",
        f"norms are in {half} ({{}})",
        NORMS,
        {
            "every step": instead(_all_in(dtype)),
            "what they read": instead(lambda x, w, eps: rms_norm(narrow(x), w, eps)),
            "before the weight": instead(lambda x, w, eps: narrow(x * _rsqrt_mean(x, eps)) * w),
            "what they return": instead(lambda x, w, eps: narrow(rms_norm(x, w, eps))),
            "the weight": instead(lambda x, w, eps: rms_norm(x, narrow(w), eps)),
            "the mean of squares": instead(lambda x, w, eps: x * narrow(_rsqrt_mean(x, eps)) * w),
            "up to the weight": instead(
                lambda x, w, eps: (
                    (x.to(dtype) * torch.rsqrt(x.to(dtype).pow(2).mean(-1, keepdim=True) + eps)).to(
                        x.dtype
                    )
                    * w
                )
            ),
        },
        rounds=True,
    )


FAULTS: list[Fault] = [
    of_number("norm_eps", "eps of the norms is {}", NORMS, _eps_values, _eps),
    one("norm_eps_zero", "the norms have no eps", NORMS, _eps(0.0)),
    one(
        "norm_eps_outside_root",
        "eps of the norms is added outside the root",
        NORMS,
        instead(lambda x, w, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w),
    ),
    one(
        "norm_weight_plus_one",
        "norms multiply by 1 + weight",
        NORMS,
        instead(lambda x, w, eps: rms_norm(x, w + 1, eps)),
    ),
    one(
        "norm_weight_dropped",
        "norms do not multiply by their weight",
        NORMS,
        instead(lambda x, w, eps: rms_norm(x, torch.ones_like(w), eps)),
    ),
    one(
        "norms_swapped",
        "the two norms of a layer are swapped",
        ("input_layernorm", "post_attention_layernorm"),
        Change(weights=_swapped),
    ),
    one("layer_norm", "norms subtract the mean (LayerNorm)", NORMS, instead(_layer_norm)),
    several(
        "norm_sum",
        "norms divide by the root of the sum, not of the mean{}",
        NORMS,
        {
            "": _by(lambda x, eps: (x.square().sum(-1, keepdim=True) + eps).sqrt()),
            ", and have no eps": _by(lambda x, eps: x.square().sum(-1, keepdim=True).sqrt()),
        },
    ),
    several(
        "norm_axes",
        "norms take the mean of squares over {}",
        NORMS,
        {
            "positions and features": _over(1, 2),
            "rows, positions and features": _over(0, 1, 2),
            "rows and features": _over(0, 2),
            "positions": _over(1),
        },
    ),
    several(
        "norm_deviation",
        "norms divide by {}",
        NORMS,
        {
            "the standard deviation": _by(
                lambda x, eps: (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
            ),
            "the standard deviation, of H - 1 features": _by(
                lambda x, eps: (x.var(-1, keepdim=True) + eps).sqrt()
            ),
            "the root of the sum of squares over H - 1": _by(
                lambda x, eps: (x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps).sqrt()
            ),
            "the mean of squares, without a root": _by(
                lambda x, eps: x.square().mean(-1, keepdim=True) + eps
            ),
            "the mean of absolute values": _by(lambda x, eps: x.abs().mean(-1, keepdim=True) + eps),
        },
    ),
    one(
        "norm_twice",
        "a norm is applied twice",
        NORMS,
        instead(lambda x, w, eps: rms_norm(rms_norm(x, w, eps), w, eps)),
    ),
    several(
        "norm_of_layer",
        "the final norm has the weight of the last layer's {}",
        ("norm",),
        {name: _of_layers_norm(name) for name in NORMS[:2]},
    ),
    one("norm_dropped", "a norm is left out", NORMS, instead(lambda x, w, eps: x)),
    one(
        "post_norm",
        "norms follow attention and the MLP",
        (*NORMS[:2], "self_attn.q_proj"),
        _post_norm(),
    ),
    *in_halves(_norm_in),
]
