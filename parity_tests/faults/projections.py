"""Mistakes in matrices, the MLP and the residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.attention import K, Q, V, rows, swapped
from parity_tests.faults.change import (
    Change,
    Config,
    Fault,
    Steps,
    Variants,
    in_bfloat16,
    of_number,
    one,
    several,
)
from parity_tests.reference import oracle
from parity_tests.traces.sections import Inputs

GATE, UP, DOWN, OUT = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"
MATRICES = (Q, K, V, OUT, GATE, UP, DOWN)
ACT = ("mlp.act",)
RESIDUAL = ("after_attention", "")


def _transposed(name: str) -> Change:
    def transpose(w: Tensor, _: Config) -> Tensor:
        return w.T.reshape(w.shape) if w.ndim == 2 else w

    return rows((name,), transpose)


def _biases_dropped(fields: Config, _: Inputs) -> Variants:
    def without(*names: str) -> Change:
        return Change(
            weights=lambda weights, *_: {
                name: value
                for name, value in weights.items()
                if not (name.endswith(".bias") and any(f"{n}." in name for n in names))
            }
        )

    if fields.get("attention_bias"):
        yield "attention", without(Q, K, V, OUT)
        for name in (Q, K, V, OUT):
            yield name, without(name)
    if fields.get("mlp_bias"):
        yield "the MLP", without(GATE, UP, DOWN)
        for name in (GATE, UP, DOWN):
            yield name, without(name)


class _RoundedMatmul(torch.autograd.Function):
    """x @ W^T of rounded operands, as hardware does it, also in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, to: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.to = to
        return to(x) @ to(weight).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), g = map(ctx.to, ctx.saved_tensors), ctx.to(g)
        return g @ weight, g.flatten(0, -2).T @ x.flatten(0, -2), None


def _rounded(to: Callable[[Tensor], Tensor]) -> Change:
    def linear(weights: Any, name: str, x: Tensor, slices: int = 1) -> Tensor:
        y = _RoundedMatmul.apply(x, weights[f"{name}.weight"], to)
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    return Change(functions={"linear": lambda _: linear})


def _ten_bits(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, as TF32."""
    bits = x.float().contiguous().view(torch.int32)
    even = (bits >> 13) & 1
    return ((bits + 0xFFF + even) & ~0x1FFF).view(torch.float32).to(x.dtype)


def _float16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


def _activations(fields: Config, _: Inputs) -> Variants:
    right = oracle.ACTIVATIONS[fields["hidden_act"]]
    seen = [right]
    for name, function in oracle.ACTIVATIONS.items():
        if function not in seen and name != "swish":
            seen.append(function)
            yield name, _with_activation(name)


def _with_activation(name: str) -> Change:
    return Change(fields=lambda fields: dict(fields) | {"hidden_act": name})


def _act(change: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]) -> Change:
    """Another product of gate and up."""

    def step(steps: Steps, value: Tensor) -> Tensor:
        function = oracle.ACTIVATIONS[steps.fields["hidden_act"]]
        gate, up = (steps.read[name].reshape(value.shape) for name in (GATE, UP))
        return change(function, gate, up)

    return Change(steps={ACT[0]: step})


def _sum(of_attention: Callable[[Steps], Tensor], of_mlp: Callable[[Steps], Tensor]) -> Change:
    """Another residual stream."""
    return Change(
        steps={"after_attention": lambda s, _: of_attention(s), "": lambda s, _: of_mlp(s)}
    )


def _weighted(stream: float, branch: float) -> Change:
    return _sum(
        lambda s: stream * s.read["x"] + branch * s.read[OUT],
        lambda s: stream * s.read["after_attention"] + branch * s.read[DOWN],
    )


FAULTS: list[Fault] = [
    several(
        "transposed", "{} is transposed", MATRICES, {name: _transposed(name) for name in MATRICES}
    ),
    one("gate_up_swapped", "gate_proj and up_proj are swapped", (GATE, UP), swapped(GATE, UP)),
    Fault("biases_dropped", "biases of {} are left out", MATRICES, _biases_dropped),
    several(
        "matmul_rounded",
        "operands of matmuls are rounded to {}",
        (*MATRICES, "lm_head"),
        {
            "tf32": _rounded(_ten_bits),
            "bfloat16": _rounded(in_bfloat16),
            "float16": _rounded(_float16),
        },
        rounds=True,
    ),
    one(
        "matmul_result_bfloat16",
        "results of matmuls are in bfloat16",
        MATRICES,
        Change(functions={"linear": lambda right: lambda *args: in_bfloat16(right(*args))}),
        rounds=True,
    ),
    Fault("activation", "the activation is {}", ACT, _activations),
    one(
        "activation_of_up",
        "the activation is of up_proj, not of gate_proj",
        ACT,
        _act(lambda f, gate, up: gate * f(up)),
    ),
    one("gate_left_out", "the product lacks the gate", ACT, _act(lambda f, gate, up: f(up))),
    one("up_left_out", "the product lacks up_proj", ACT, _act(lambda f, gate, up: f(gate))),
    one(
        "activation_of_product",
        "the activation is of the product of gate and up",
        ACT,
        _act(lambda f, gate, up: f(gate * up)),
    ),
    of_number(
        "activation_clamped",
        "gate and up are clamped at {}",
        ACT,
        lambda _: (7.0, 10.0, 1.0),
        lambda limit: _act(lambda f, gate, up: f(gate.clamp(max=limit)) * up.clamp(-limit, limit)),
    ),
    several(
        "activation_bfloat16",
        "the MLP's product is in bfloat16 ({})",
        ACT,
        {
            "the product": _act(lambda f, gate, up: in_bfloat16(f(gate) * up)),
            "the activation": _act(lambda f, gate, up: in_bfloat16(f(gate)) * up),
            "what it reads": _act(lambda f, gate, up: f(in_bfloat16(gate)) * in_bfloat16(up)),
            "every step": _act(
                lambda f, gate, up: in_bfloat16(in_bfloat16(f(in_bfloat16(gate))) * in_bfloat16(up))
            ),
        },
        rounds=True,
    ),
    of_number(
        "residual_multiplier",
        "attention and the MLP are multiplied by {} before they are added",
        RESIDUAL,
        lambda fields: (0.22, 0.5, 2.0**-0.5, (2 * fields["num_hidden_layers"]) ** -0.5, 2.0),
        lambda value: _weighted(1.0, value),
    ),
    of_number(
        "residual_weight",
        "the residual stream is multiplied by {}",
        RESIDUAL,
        lambda _: (0.5, 2.0**-0.5, 2.0),
        lambda value: _weighted(value, 1.0),
    ),
    one("residual_mean", "the residual stream is a mean, not a sum", RESIDUAL, _weighted(0.5, 0.5)),
    one("residual_dropped", "the residual connection is left out", RESIDUAL, _weighted(0.0, 1.0)),
    one(
        "residual_subtracted",
        "attention and the MLP are subtracted",
        RESIDUAL,
        _weighted(1.0, -1.0),
    ),
    one(
        "residual_of_norm",
        "the residual connection begins after the norm",
        RESIDUAL,
        _sum(
            lambda s: s.read["input_layernorm"] + s.read[OUT],
            lambda s: s.read["post_attention_layernorm"] + s.read[DOWN],
        ),
    ),
    one(
        "mlp_beside_attention",
        "the MLP reads what attention reads, not what it returns",
        RESIDUAL,
        _sum(lambda s: s.read["x"], lambda s: s.read["x"] + s.read[OUT] + s.read[DOWN]),
    ),
    several(
        "residual_bfloat16",
        "the residual stream is in bfloat16 ({})",
        RESIDUAL,
        {
            "each sum": _sum(
                lambda s: in_bfloat16(s.read["x"] + s.read[OUT]),
                lambda s: in_bfloat16(s.read["after_attention"] + s.read[DOWN]),
            ),
            "operands and sums": _sum(
                lambda s: in_bfloat16(in_bfloat16(s.read["x"]) + in_bfloat16(s.read[OUT])),
                lambda s: in_bfloat16(
                    in_bfloat16(s.read["after_attention"]) + in_bfloat16(s.read[DOWN])
                ),
            ),
            "what is added": _sum(
                lambda s: s.read["x"] + in_bfloat16(s.read[OUT]),
                lambda s: s.read["after_attention"] + in_bfloat16(s.read[DOWN]),
            ),
        },
        rounds=True,
    ),
]
