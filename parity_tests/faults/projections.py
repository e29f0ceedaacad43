"""Mistakes in matrices, the MLP and the residual stream."""

import re
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
    Weights,
    in_halves,
    of_number,
    one,
    rounded_to,
    several,
)
from parity_tests.reference import oracle
from parity_tests.traces.sections import Inputs

GATE, UP, DOWN, OUT = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"
MATRICES = (Q, K, V, OUT, GATE, UP, DOWN)
ACT = ("mlp.act",)
RESIDUAL = ("after_attention", "")
NORMS = ("input_layernorm", "post_attention_layernorm")


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


def _biases_twice(fields: Config, _: Inputs) -> Variants:
    def twice(weights: Weights, *_: Any) -> Weights:
        return {n: 2 * w if n.endswith(".bias") else w for n, w in weights.items()}

    if fields.get("attention_bias") or fields.get("mlp_bias"):
        yield "", Change(weights=twice)


def _gate_up(parts: int, *, packed: bool) -> Change:
    """Rows of gate and up, in so many parts of both but read as two, or the reverse; 0: one by one."""

    def weights(weights: Weights, *_: Any) -> Weights:
        result = dict(weights)
        for gate in [name for name in weights if f"{GATE}." in name]:
            up = gate.replace(GATE, UP)
            count = parts or len(weights[gate])
            if packed:
                both = torch.stack([weights[n].unflatten(0, (count, -1)) for n in (gate, up)], 1)
                result[gate], result[up] = both.flatten(0, 2).chunk(2)
            else:
                both = torch.cat([weights[gate], weights[up]]).unflatten(0, (count, 2, -1))
                result[gate], result[up] = both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1)
        return result

    return Change(weights=weights)


def _of_layer(of: Callable[[int, int], int], names: tuple[str, ...]) -> Change:
    """Parameters of another layer: `of` its index and the number of layers."""

    def weights(weights: Weights, fields: Config, read: Callable[[str], Tensor]) -> Weights:
        result = dict(weights)
        for name in weights:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer is None or not any(f"{part}." in name for part in names):
                continue
            other = of(int(layer[1]), fields["num_hidden_layers"])
            result[name] = read(f"model.layers.{other}.{name.removeprefix(layer[0])}")
        return result

    return Change(weights=weights)


def _as_text(index: int, count: int) -> int:
    return sorted(range(count), key=str)[index]


_ORDERS: dict[str, Callable[[int, int], int]] = {
    "layers are one too far": lambda index, count: (index + 1) % count,
    "layers are one too early": lambda index, count: (index - 1) % count,
    "the first layer's everywhere": lambda index, count: 0,
    "layers in reverse": lambda index, count: count - 1 - index,
    "layers sorted as text: 0, 1, 10, 11, 2": _as_text,
    "layers sorted as text: 0, 1, 3, 4, ..., 11, 2": lambda index, count: sorted(
        range(count), key=str
    ).index(index),
}

_ALONE = ("layers are one too far", "layers are one too early")
"""Orders that a single matrix may have."""


def _other_layers(fields: Config, _: Inputs) -> Variants:
    count = fields["num_hidden_layers"]
    seen = [tuple(range(count))]
    for words, of in _ORDERS.items():
        order = tuple(of(index, count) for index in range(count))
        if order not in seen:
            seen.append(order)
            yield words, _of_layer(of, (*MATRICES, *NORMS))
            yield f"{words}, of the norms alone", _of_layer(of, NORMS)
            for name in MATRICES if words in _ALONE else ():
                yield f"{words}, of {name} alone", _of_layer(of, (name,))


def _rounded_weights(to: Callable[[Tensor], Tensor], *, all_of_them: bool = True) -> Change:
    def weights(weights: Weights, *_: Any) -> Weights:
        def is_rounded(name: str) -> bool:
            return all_of_them or any(f"{part}.weight" in name for part in MATRICES)

        return {n: to(w) if is_rounded(n) else w for n, w in weights.items()}

    return Change(weights=weights)


def _integers(w: Tensor) -> Tensor:
    """In 8 bits, with a scale for each row."""
    scale = w.float().abs().amax(-1, keepdim=True) / 127
    return ((w.float() / scale).round() * scale).to(w.dtype)


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


_HALVES = "one after the other"
_LAYOUTS = {
    0: "row by row",
    2: "in 2 parts of both",
    4: "in 4 parts of both",
    8: "in 8 parts of both",
}


def _matmul_result_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return one(
        f"matmul_result_{half}",
        f"results of matmuls are in {half}",
        MATRICES,
        Change(functions={"linear": lambda right: lambda *args: narrow(right(*args))}),
        rounds=True,
    )


def _activation_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"activation_{half}",
        f"the MLP's product is in {half} ({{}})",
        ACT,
        {
            "the product": _act(lambda f, gate, up: narrow(f(gate) * up)),
            "the activation": _act(lambda f, gate, up: narrow(f(gate)) * up),
            "what it reads": _act(lambda f, gate, up: f(narrow(gate)) * narrow(up)),
            "the gate and the activation": _act(lambda f, gate, up: narrow(f(narrow(gate))) * up),
            "every step": _act(lambda f, gate, up: narrow(narrow(f(narrow(gate))) * narrow(up))),
        },
        rounds=True,
    )


def _residual_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"residual_{half}",
        f"the residual stream is in {half} ({{}})",
        RESIDUAL,
        {
            "each sum": _sum(
                lambda s: narrow(s.read["x"] + s.read[OUT]),
                lambda s: narrow(s.read["after_attention"] + s.read[DOWN]),
            ),
            "operands and sums": _sum(
                lambda s: narrow(narrow(s.read["x"]) + narrow(s.read[OUT])),
                lambda s: narrow(narrow(s.read["after_attention"]) + narrow(s.read[DOWN])),
            ),
            "what is added": _sum(
                lambda s: s.read["x"] + narrow(s.read[OUT]),
                lambda s: s.read["after_attention"] + narrow(s.read[DOWN]),
            ),
        },
        rounds=True,
    )


FAULTS: list[Fault] = [
    several(
        "transposed", "{} is transposed", MATRICES, {name: _transposed(name) for name in MATRICES}
    ),
    one("gate_up_swapped", "gate_proj and up_proj are swapped", (GATE, UP), swapped(GATE, UP)),
    several(
        "gate_up_layout",
        "rows of fused gate_proj and up_proj are {}",
        (GATE, UP),
        {
            f"packed {words}, but read {other}": _gate_up(parts, packed=packed)
            for parts, layout in _LAYOUTS.items()
            for packed in (True, False)
            for words, other in [(layout, _HALVES) if packed else (_HALVES, layout)]
        },
    ),
    Fault(
        "layer_order",
        "weights are of another layer: {}",
        (*NORMS, *MATRICES),
        _other_layers,
    ),
    several(
        "weights_rounded",
        "weights are rounded to {}",
        ("embed_tokens", *NORMS, *MATRICES, "norm", "lm_head"),
        {
            "bfloat16": _rounded_weights(rounded_to(torch.bfloat16)),
            "float16": _rounded_weights(rounded_to(torch.float16)),
            "integers of 8 bits": _rounded_weights(_integers, all_of_them=False),
            "float8_e4m3": _rounded_weights(rounded_to(torch.float8_e4m3fn), all_of_them=False),
        },
    ),
    Fault("biases_twice", "biases are added twice", MATRICES, _biases_twice),
    Fault("biases_dropped", "biases of {} are left out", MATRICES, _biases_dropped),
    several(
        "matmul_rounded",
        "operands of matmuls are rounded to {}",
        (*MATRICES, "lm_head"),
        {
            "tf32": _rounded(_ten_bits),
            "bfloat16": _rounded(rounded_to(torch.bfloat16)),
            "float16": _rounded(rounded_to(torch.float16)),
            "float8_e4m3": _rounded(rounded_to(torch.float8_e4m3fn)),
        },
        rounds=True,
    ),
    *in_halves(_matmul_result_in),
    Fault("activation", "the activation is {}", ACT, _activations),
    one(
        "activation_of_up",
        "the activation is of up_proj, not of gate_proj",
        ACT,
        _act(lambda f, gate, up: gate * f(up)),
    ),
    one("gate_left_out", "the product lacks the gate", ACT, _act(lambda f, gate, up: f(up))),
    one(
        "activation_sum",
        "gate and up are added, not multiplied",
        ACT,
        _act(lambda f, gate, up: f(gate) + up),
    ),
    one(
        "activation_twice",
        "the activation is applied twice",
        ACT,
        _act(lambda f, gate, up: f(f(gate)) * up),
    ),
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
    *in_halves(_activation_in),
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
    several(
        "branch_left_out",
        "{} not added to the residual stream",
        RESIDUAL,
        {
            "attention is": _sum(
                lambda s: s.read["x"], lambda s: s.read["after_attention"] + s.read[DOWN]
            ),
            "the MLP is": _sum(
                lambda s: s.read["x"] + s.read[OUT], lambda s: s.read["after_attention"]
            ),
        },
    ),
    one(
        "layer_left_out",
        "a layer is left out: it returns what it reads",
        RESIDUAL,
        _sum(lambda s: s.read["x"] + s.read[OUT], lambda s: s.read["x"]),
    ),
    one(
        "residual_of_layer",
        "the MLP is added to what the layer reads: attention is lost",
        RESIDUAL,
        _sum(lambda s: s.read["x"] + s.read[OUT], lambda s: s.read["x"] + s.read[DOWN]),
    ),
    one(
        "norm_of_branch",
        "the second norm reads what attention returns, without the residual stream",
        RESIDUAL,
        _sum(lambda s: s.read[OUT], lambda s: s.read["x"] + s.read[OUT] + s.read[DOWN]),
    ),
    one(
        "mlp_beside_attention",
        "the MLP reads what attention reads, not what it returns",
        RESIDUAL,
        _sum(lambda s: s.read["x"], lambda s: s.read["x"] + s.read[OUT] + s.read[DOWN]),
    ),
    *in_halves(_residual_in),
]
