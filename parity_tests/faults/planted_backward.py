"""Faults in the backward pass of two programs, written without the catalogue; all values are right."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from parity_tests.faults import planted_jax, planted_torch

LAST = "layers.1"  # the first layer of the backward pass
V, K = (f"{LAST}.self_attn.{p}_proj" for p in "vk")
K_ROTATED, MIDDLE = f"{LAST}.self_attn.rotate.k", f"{LAST}.after_attention"
GATE, DOWN = (f"{LAST}.mlp.{p}_proj" for p in ("gate", "down"))
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# transformers' Llama ------------------------------------------------------------------------------


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.change(g), None


def _changed(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x, with a changed gradient."""
    return _Changed.apply(x, change)


def _value(right: Tensor, of_gradient: Tensor) -> Tensor:
    """One value with the gradient of another."""
    return right.detach() + (of_gradient - of_gradient.detach())


def _parameters(which: Callable[[str], bool], change: Callable[[Tensor], Tensor]) -> Any:
    def of_model(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if which(name):
                parameter.register_hook(change)

    return of_model


def _forward_of(
    forward: Callable[[Tensor, Tensor], Tensor], module: torch.nn.Linear, x: Tensor
) -> Tensor:
    return forward(x, module.weight)


def _linears(forward: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Of all projections and the head."""

    def of_model(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                vars(module)["forward"] = partial(_forward_of, forward, module)

    return of_model


class _SummedInBfloat16(torch.autograd.Function):
    """A projection that sums its weight's gradient over the rows of the batch in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        total = torch.zeros_like(w, dtype=torch.bfloat16)
        for x_of_row, g_of_row in zip(x, g, strict=True):
            total += (g_of_row.T @ x_of_row).bfloat16()
        return g @ w, total.to(w.dtype)


def _own_row(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.linear(x[:1], w), F.linear(x[1:], w.detach())])


def _norm(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """f of the weight and of the normalized input."""
    return planted_torch._norms(
        lambda self, x: f(self.weight, planted_torch._unit(x, self.variance_epsilon))
    )


def _scale_detached(self: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (x * scale.detach())


def _without_sum(s: Tensor) -> Tensor:
    p = s.softmax(-1)
    return _value(p, p.detach() * s.clamp(min=-1e4))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = planted_torch._half(x)
    return _value(x * cos + half * sin, x * cos - half * sin)


def _repeated(of_head: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """`of_head` of keys or values, for each query head of their group."""
    return lambda x, times: torch.stack([of_head(x, i) for i in range(times)], 2).flatten(1, 2)


class _Rows(torch.autograd.Function):
    """Rows of a table; the gradient of a token is written, not added."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.ids, ctx.shape = ids, table.shape
        return table[ids]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        result = g.new_zeros(ctx.shape)
        for token, row in zip(ctx.ids.flatten(), g.flatten(0, 1), strict=True):
            result[token] = row
        return result, None


def _rows(rows: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        embedding = model.model.embed_tokens
        embedding.forward = lambda ids: rows(embedding.weight, ids)

    return change


def _silu(gate: Tensor) -> Tensor:
    return _value(F.silu(gate), gate * gate.sigmoid().detach())


def _loss(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """The gradient is that of f."""
    return planted_torch._loss(lambda x, y: _value(planted_torch._ce(x, y), f(x, y)))


def _all_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return planted_torch._ce(logits, labels, reduction="sum") / labels.numel()


def _ignored_too(logits: Tensor, labels: Tensor) -> Tensor:
    counted = (labels[:, 1:] != -100).sum()
    return planted_torch._ce(logits, labels.clamp(min=0), reduction="sum") / counted


def _torch(fault: str, begins: str, *, eager: bool = False, **options: Any) -> planted_torch.Plant:
    attention = "eager" if eager else "sdpa"
    return planted_torch.Plant(fault, begins, attention=attention, direction="backward", **options)


_EAGER = partial(_torch, eager=True)
_attention = planted_torch._eager

TORCH: dict[str, planted_torch.Plant] = {
    "norm's scale detached": _torch(
        "norm_scale_detached", LAST, change=planted_torch._norms(_scale_detached)
    ),
    "norm without weight": _torch(
        "norm_gradient_without_weight",
        LAST,
        change=_norm(lambda w, x: _value(w * x, x + w * x.detach())),
    ),
    "norms frozen": _torch(
        "frozen", "model.norm.weight", change=_parameters(lambda n: "norm" in n, lambda g: 0 * g)
    ),
    "rotated forward": _torch(
        "rotation_not_transposed", K, functions=planted_torch._rotary(_turned)
    ),
    "softmax without sum": _EAGER(
        "softmax_gradient_without_sum", K, functions=_attention(softmax=_without_sum)
    ),
    "softmax detached": _EAGER(
        "softmax_detached",
        K,
        functions=_attention(softmax=lambda s: s.detach().softmax(-1) + 0 * s.clamp(min=-1e4)),
    ),
    "scores scaled twice": _EAGER(
        "scores_gradient_scale",
        K,
        functions=_attention(
            mask=lambda m: m, softmax=lambda s: _changed(s, lambda g: g * 8**-0.5).softmax(-1)
        ),
    ),
    "kv mean": _EAGER(
        "kv_gradient_mean",
        V,
        functions=_attention(repeat=_repeated(lambda x, i: _changed(x, lambda g: g / 3))),
    ),
    "kv of first head": _EAGER(
        "kv_gradient_of_one",
        V,
        functions=_attention(repeat=_repeated(lambda x, i: x.detach() if i else x)),
    ),
    "kv of last head": _EAGER(
        "kv_gradient_of_one",
        V,
        functions=_attention(repeat=_repeated(lambda x, i: x if i == 2 else x.detach())),
    ),
    "silu's derivative": _torch(
        "activation_gradient", GATE, change=planted_torch._mlp(lambda g, u: _silu(g) * u)
    ),
    "gate detached": _torch(
        "gate_detached",
        GATE,
        change=planted_torch._mlp(lambda g, u: _changed(F.silu(g), lambda d: 0 * d) * u),
    ),
    "stream detached": _torch(
        "residual_detached", MIDDLE, change=planted_torch._layer(lambda x, y, _: x.detach() + y)
    ),
    "branch without gradient": _torch(
        "residual_detached",
        DOWN,
        change=planted_torch._layer(lambda x, y, _: x + _changed(y, lambda g: 0 * g)),
    ),
    "embedding overwritten": _torch(
        "embedding_gradient_overwritten", TABLE, change=_rows(_Rows.apply)
    ),
    "embedding frozen": _torch(
        "frozen", TABLE, change=_rows(lambda w, ids: _changed(w[ids], lambda g: 0 * g))
    ),
    "tied without head": _torch(
        "frozen",
        TABLE,
        of="tied",
        change=lambda m: setattr(m.lm_head, "forward", lambda x: x @ m.lm_head.weight.detach().T),
    ),
    "tied without rows": _torch(
        "frozen", TABLE, of="tied", change=_rows(lambda w, ids: _changed(w[ids], lambda g: 0 * g))
    ),
    "mean over all": _torch(
        "gradient_scale", "lm_head", change=_loss(_all_tokens), inputs=("labels",)
    ),
    "times 0.37": _torch(
        "gradient_scale", "lm_head", change=_loss(lambda x, y: planted_torch._ce(x, y) * 0.37)
    ),
    "ignored have gradients": _torch(
        "ignored_have_gradients", "lm_head", change=_loss(_ignored_too), inputs=("labels",)
    ),
    "weights bf16": _torch(
        "weight_gradient_bfloat16", HEAD, change=_parameters(lambda _: True, planted_torch.bf16)
    ),
    "weights summed in bf16": _torch(
        "weight_gradient_bfloat16", HEAD, change=_linears(_SummedInBfloat16.apply)
    ),
    "weights of the first row": _torch("weight_gradient_rows", HEAD, change=_linears(_own_row)),
    "accumulated twice": _torch(
        "parameter_gradient_scale", HEAD, change=_parameters(lambda _: True, lambda g: 2 * g)
    ),
    "mean of occurrences": _torch(
        "embedding_gradient_mean",
        TABLE,
        change=_rows(lambda w, ids: F.embedding(ids, w, scale_grad_by_freq=True)),
    ),
    "weights float16": _torch(
        "weight_gradient_float16",
        HEAD,
        change=_parameters(lambda _: True, lambda g: g.half().float()),
    ),
    "stream bf16": _torch(
        "gradient_bfloat16",
        DOWN,
        change=planted_torch._layer(lambda x, y, _: _changed(x + y, planted_torch.bf16)),
    ),
}


# The Llama in plain JAX ---------------------------------------------------------------------------

_stop = jax.lax.stop_gradient
_RIGHT = planted_jax._RIGHT


def _valued(right: Array, of_gradient: Array) -> Array:
    """One value with the gradient of another."""
    return _stop(right) + (of_gradient - _stop(of_gradient))


@jax.custom_vjp
def _summed(x: Array, w: Array) -> Array:
    return x @ w


def _summed_backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = operands
    total = jnp.zeros(w.shape, jnp.bfloat16)
    for row in range(len(x)):
        total = total + (x[row].T @ g[row]).astype(jnp.bfloat16)
    return g @ w.T, total.astype(w.dtype)


_summed.defvjp(lambda x, w: (x @ w, (x, w)), _summed_backward)


@jax.custom_vjp
def _written(table: Array, ids: Array) -> Array:
    return table[ids]


def _written_backward(kept: tuple[Any, Array], g: Array) -> tuple[Array, None]:
    shape, ids = kept
    result = jnp.zeros(shape, g.dtype)
    flat = g.reshape(-1, g.shape[-1])
    for at in range(ids.size):
        result = result.at[ids.reshape(-1)[at]].set(flat[at])
    return result, None


_written.defvjp(lambda table, ids: (table[ids], (table.shape, ids)), _written_backward)


def _heads(of_head: Callable[[Array, int], Array]) -> Callable[[Array, int], Array]:
    """`of_head` of keys or values [B, T, K, D], for each query head of their group."""

    def heads(x: Array, times: int) -> Array:
        every = jnp.stack([of_head(x, i) for i in range(times)], axis=3)
        return every.reshape(*x.shape[:2], -1, x.shape[-1])

    return heads


def _norm_of(f: Callable[[Array, Array], Array]) -> dict[str, Any]:
    """f of the weight and of the normalized input."""
    return {"norm": lambda x, w, eps: f(w[None, None], planted_jax._unit(x, eps))}


def _scale_stopped(x: Array, w: Array, eps: float) -> Array:
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * _stop(scale) * w[None, None]


def _ce(f: Callable[[Array, Array], Array]) -> dict[str, Any]:
    """The gradient is that of f."""
    return {"cross_entropy": lambda x, y: _valued(_RIGHT["cross_entropy"](x, y), f(x, y))}


def _with_ignored(logits: Array, labels: Array) -> Array:
    every = _RIGHT["cross_entropy"](logits, jnp.maximum(labels, 0))
    return every / jnp.mean(labels[:, 1:] != -100)


def _jax(fault: str, begins: str, functions: Any, **options: Any) -> planted_jax.Plant:
    return planted_jax.Plant(fault, begins, functions, direction="backward", **options)


_mix = planted_jax._mix

JAX: dict[str, planted_jax.Plant] = {
    "norm's scale detached": _jax("norm_scale_detached", LAST, {"norm": _scale_stopped}),
    "norms frozen": _jax("frozen", "model.norm.weight", _norm_of(lambda w, x: _stop(w) * x)),
    "norms of half the sequence": _jax(
        "gradient_of_positions",
        "model.norm.weight",
        {
            "norm": lambda x, w, eps: jnp.concatenate(
                [_RIGHT["norm"](x[:, :12], w, eps), _RIGHT["norm"](x[:, 12:], _stop(w), eps)],
                axis=1,
            )
        },
    ),
    "kv of first head": _jax(
        "kv_gradient_of_one", K_ROTATED, _mix(heads=_heads(lambda x, i: _stop(x) if i else x))
    ),
    "keys detached": _jax(
        "attention_detached",
        K_ROTATED,
        planted_jax._before("mix", lambda q, k, v, seen: (q, _stop(k), v, seen)),
    ),
    "branch detached": _jax("residual_detached", DOWN, {"add": lambda x, y: x + _stop(y)}),
    "embedding overwritten": _jax("embedding_gradient_overwritten", TABLE, {"embed": _written}),
    "tied without head": _jax(
        "frozen", TABLE, {"unembed": lambda params, x: x @ _stop(params["table"]).T}, of="tied"
    ),
    "times 0.37": _jax(
        "gradient_scale", "lm_head", _ce(lambda x, y: _RIGHT["cross_entropy"](x, y) * 0.37)
    ),
    "ignored have gradients": _jax(
        "ignored_have_gradients", "lm_head", _ce(_with_ignored), inputs=("labels",)
    ),
    "weights summed in bf16": _jax(
        "weight_gradient_bfloat16",
        HEAD,
        {"project": _summed, "unembed": lambda params, x: _summed(x, params["head"])},
    ),
    "weights of the first row": _jax(
        "weight_gradient_rows",
        f"{DOWN}.weight".replace("layers", "model.layers"),
        {"project": lambda x, w: jnp.concatenate([x[:1] @ w, x[1:] @ _stop(w)])},
    ),
}
