"""Mistakes in attention: projections' rows, heads, masks, scores and softmax."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.faults.change import (
    Change,
    Config,
    Family,
    Fault,
    Steps,
    Variants,
    Weights,
    in_bfloat16,
    of_number,
    one,
    several,
)
from parity_tests.reference import oracle
from parity_tests.reference.oracle import rms_norm
from parity_tests.traces.sections import Inputs

ATTENTION = ("self_attn.attention",)
Q, K, V = (f"self_attn.{p}_proj" for p in "qkv")


def _same(x: Tensor) -> Tensor:
    return x


def attend(
    *,
    scores: Callable[[Tensor], Tensor] = _same,
    softmax: Callable[[Tensor], Tensor] = lambda s: torch.softmax(s, dim=-1),
    probabilities: Callable[[Tensor], Tensor] = _same,
) -> Change:
    """Attention with other scores before the mask, another softmax, other probabilities."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        s = scores(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
        p = softmax(s.masked_fill(~visible, torch.finfo(torch.float32).min)) * visible
        return probabilities(p) @ v, p

    return Change(functions={"attention": lambda _: attention})


def _on_heads(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    after: Callable[[Tensor, int], Tensor] = lambda out, _: out,
) -> Change:
    """Attention to other heads [B, N, T, D]."""

    def replacement(attention: Any) -> Any:
        def wrong(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Any:
            out, probabilities = attention(*change(q, k, v), visible)
            return after(out, k.shape[1]), probabilities

        return wrong

    return Change(functions={"attention": replacement})


def _tiled(x: Tensor, kv_heads: int) -> Tensor:
    """Heads in the order in which `tile` would have them read their keys."""
    return x.unflatten(1, (-1, kv_heads)).transpose(1, 2).flatten(1, 2)


def _untiled(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)


def _scaled(factor: float) -> Change:
    """Scores are multiplied by this, besides 1/sqrt(D)."""
    return _on_heads(lambda q, k, v: (q * factor, k, v))


def _scales(fields: Config) -> list[float]:
    dim, heads, hidden = (
        oracle.head_dim(fields),
        fields["num_attention_heads"],
        fields["hidden_size"],
    )
    kv_dim = hidden // fields["num_key_value_heads"]
    values = ((hidden // heads) ** -0.5, hidden**-0.5, kv_dim**-0.5, dim**-0.25)
    return [value for value in values if not math.isclose(value, dim**-0.5)]


def _scale(fields: Config) -> Callable[[float], Change]:
    return lambda value: _scaled(value * oracle.head_dim(fields) ** 0.5)


def _scaled_by_power(power: float) -> Callable[[Config, Inputs], Variants]:
    """Scores are multiplied by this power of D, besides 1/sqrt(D)."""
    return lambda fields, _: [("", _scaled(oracle.head_dim(fields) ** power))]


def _visible(change: Callable[[Tensor, Any], Tensor]) -> Change:
    """Other visibility, of that which the right one is."""

    def replacement(right: Any) -> Any:
        def wrong(batch: int, length: int, mask: Any = None, segments: Any = None) -> Tensor:
            return change(right(batch, length, mask, segments), (batch, length, mask, segments))

        return wrong

    return Change(functions={"visibility": replacement}, future=True)


def _shown(visible: Tensor, arguments: Any, *, diagonal: int | None) -> Tensor:
    """Keys up to `diagonal` after the query, all for None; what masks hide stays hidden."""
    _, length, mask, segments = arguments
    shown = torch.ones(length, length, dtype=torch.bool)
    shown = (shown if diagonal is None else shown.tril(diagonal)).expand(visible.shape)
    if mask is not None:
        shown = shown & mask.bool()[:, None, None, :]
    if segments is not None:
        shown = shown & (segments[:, None, :, None] == segments[:, None, None, :])
    return shown


def _window(size: int) -> Change:
    return _visible(lambda visible, _: visible & torch.ones_like(visible).triu(1 - size))


def _windows(_: Config, inputs: Inputs) -> Variants:
    length = inputs.ids.shape[1]
    sizes = {2**n for n in range(1, 14)} | {2**n + 1 for n in range(1, 14)}
    for size in sorted(size for size in sizes if size < length):
        yield size, _window(size)


def _leak(_: Config, inputs: Inputs) -> Variants:
    if inputs.segment_ids is not None:
        yield "", Change(inputs=lambda i: i._replace(segment_ids=None))


def _padding(_: Config, inputs: Inputs) -> Variants:
    if inputs.attention_mask is not None:
        yield "is ignored", Change(inputs=lambda i: i._replace(attention_mask=None))
        flipped = np.ascontiguousarray(inputs.attention_mask[:, ::-1])
        yield "is on the other side", Change(inputs=lambda i: i._replace(attention_mask=flipped))
        inverted = 1 - inputs.attention_mask.astype(np.int64)
        yield (
            "is taken for text, and text for it",
            Change(inputs=lambda i: i._replace(attention_mask=inverted)),
        )


def rows(names: tuple[str, ...], change: Callable[[Tensor, Config], Tensor]) -> Change:
    """Other rows of these projections and their biases."""

    def weights(weights: Weights, fields: Config, _: Any) -> Weights:
        return {
            name: change(value, fields) if any(f"{n}." in name for n in names) else value
            for name, value in weights.items()
        }

    return Change(weights=weights)


def _metas_order(w: Tensor, fields: Config) -> Tensor:
    """Rows of each head from halves to pairs of neighbours."""
    return w.unflatten(0, (-1, 2, oracle.head_dim(fields) // 2)).transpose(1, 2).flatten(0, 2)


def _from_metas_order(w: Tensor, fields: Config) -> Tensor:
    """As if the rows had been pairs of neighbours."""
    return w.unflatten(0, (-1, oracle.head_dim(fields) // 2, 2)).transpose(1, 2).flatten(0, 2)


def _heads_by_group(w: Tensor, fields: Config) -> Tensor:
    """Query heads in the order of tiled key/value heads."""
    return (
        w.unflatten(0, (fields["num_key_value_heads"], -1, oracle.head_dim(fields)))
        .transpose(0, 1)
        .flatten(0, 2)
    )


def _heads_reversed_group(w: Tensor, fields: Config) -> Tensor:
    return (
        w.unflatten(0, (-1, fields["num_key_value_heads"], oracle.head_dim(fields)))
        .transpose(0, 1)
        .flatten(0, 2)
    )


def _features_first(w: Tensor, fields: Config) -> Tensor:
    """[D, heads] read as [heads, D]."""
    return w.unflatten(0, (-1, oracle.head_dim(fields))).transpose(0, 1).flatten(0, 1)


def _features_last(w: Tensor, fields: Config) -> Tensor:
    return w.unflatten(0, (oracle.head_dim(fields), -1)).transpose(0, 1).flatten(0, 1)


def swapped(first: str, second: str) -> Change:
    """Two projections, with their biases, are swapped if they have the same shapes."""

    def weights(weights: Weights, *_: Any) -> Weights:
        def partner(name: str) -> str:
            if f"{first}." in name:
                return name.replace(first, second)
            return name.replace(second, first) if f"{second}." in name else name

        pairs = {name: weights.get(partner(name), value) for name, value in weights.items()}
        same = all(pairs[name].shape == weights[name].shape for name in weights)
        return pairs if same else weights

    return Change(weights=weights)


def _heads_mixed(steps: Steps, value: Tensor) -> Tensor:
    """[B, heads, T, D] read as [B, T, heads * D]."""
    batch, length, _ = value.shape
    dim = oracle.head_dim(steps.fields)
    return value.view(batch, length, -1, dim).transpose(1, 2).reshape(value.shape)


def _softmax_plus_one(scores: Tensor) -> Tensor:
    zero = scores.new_zeros((*scores.shape[:-1], 1))
    return torch.softmax(torch.cat((scores, zero), dim=-1), dim=-1)[..., :-1]


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, x.new_ones(x.shape[-1]), 1e-6)


def _capped(cap: float) -> Change:
    return attend(scores=lambda s: cap * torch.tanh(s / cap))


def _first_head(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def _rounded_operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return in_bfloat16(q), in_bfloat16(k), in_bfloat16(v)


def _softmax_in_bfloat16(scores: Tensor) -> Tensor:
    return torch.softmax(scores.to(torch.bfloat16), dim=-1).to(scores.dtype)


FAULTS: list[Fault] = [
    several(
        "no_qk_permutation",
        "{} rows in Meta's order",
        (Q, K),
        {
            "q and k": rows((Q, K), _metas_order),
            "q": rows((Q,), _metas_order),
            "k": rows((K,), _metas_order),
        },
    ),
    several(
        "qk_permuted_twice",
        "{} rows reordered as if they were in Meta's order",
        (Q, K),
        {
            "q and k": rows((Q, K), _from_metas_order),
            "q": rows((Q,), _from_metas_order),
            "k": rows((K,), _from_metas_order),
        },
    ),
    several(
        "head_order",
        "rows of projections in another order: {}",
        (Q, K, V),
        {
            "query heads of a group apart": rows((Q,), _heads_by_group),
            "query heads of other groups side by side": rows((Q,), _heads_reversed_group),
            "features before heads, q, k and v": rows((Q, K, V), _features_first),
            "features before heads, q": rows((Q,), _features_first),
            "heads before features, q, k and v": rows((Q, K, V), _features_last),
            "heads before features, q": rows((Q,), _features_last),
        },
    ),
    one("kv_swapped", "k_proj and v_proj are swapped", (K, V), swapped(K, V)),
    one("qk_swapped", "q_proj and k_proj are swapped", (Q, K), swapped(Q, K)),
    one(
        "kv_heads_tiled",
        "key/value heads are tiled, not repeated: query head n reads head n % K",
        ATTENTION,
        _on_heads(
            lambda q, k, v: (_tiled(q, k.shape[1]), k, v), lambda out, count: _untiled(out, count)
        ),
    ),
    one(
        "kv_head_first",
        "all query heads read the first key/value head",
        ATTENTION,
        _on_heads(lambda q, k, v: (q, _first_head(k), _first_head(v))),
    ),
    Fault("scale_twice", "scores are scaled twice, by 1/D", ATTENTION, _scaled_by_power(-0.5)),
    Fault("scale_none", "scores are not scaled", ATTENTION, _scaled_by_power(0.5)),
    Fault(
        "attention_scale",
        "scores are scaled by {}",
        ATTENTION,
        lambda _, __: (),
        lambda fields: Family(tuple(_scales(fields)), _scale(fields)),
    ),
    several(
        "mask_off_by_one",
        "the causal mask is off by one: {}",
        ATTENTION,
        {
            "queries see the next token": _visible(
                lambda visible, a: _shown(visible, a, diagonal=1)
            ),
            "queries do not see themselves": _visible(
                lambda visible, a: _shown(visible, a, diagonal=-1)
            ),
            "but for the first query, they do not see themselves": _visible(
                lambda visible, a: (
                    _shown(visible, a, diagonal=-1)
                    | (torch.eye(a[1], dtype=torch.bool) & (torch.arange(a[1]) == 0)[:, None])
                )
            ),
        },
    ),
    one(
        "mask_left_out",
        "no causal mask: queries see all later tokens",
        ATTENTION,
        _visible(lambda visible, a: _shown(visible, a, diagonal=None)),
    ),
    Fault("sliding_window", "queries see only {} tokens", ATTENTION, _windows),
    Fault("documents_leak", "segment_ids are ignored: documents see each other", ATTENTION, _leak),
    Fault("padding", "padding {}", ATTENTION, _padding),
    of_number(
        "attention_softcap",
        "scores are capped by tanh at {}",
        ATTENTION,
        lambda _: (20.0, 30.0, 50.0),
        _capped,
    ),
    one(
        "softmax_plus_one",
        "the softmax has 1 added to its sum",
        ATTENTION,
        attend(softmax=_softmax_plus_one),
    ),
    one(
        "softmax_over_queries",
        "the softmax is over queries, not keys",
        ATTENTION,
        attend(softmax=lambda s: torch.softmax(s, dim=-2)),
    ),
    one("softmax_left_out", "scores have no softmax", ATTENTION, attend(softmax=_same)),
    one(
        "heads_not_transposed",
        "heads are not moved beside their features before o_proj",
        ATTENTION,
        Change(steps={ATTENTION[0]: _heads_mixed}),
    ),
    one(
        "qk_norm",
        "queries and keys are normalized",
        ATTENTION,
        _on_heads(lambda q, k, v: (_normed(q), _normed(k), v)),
    ),
    several(
        "softmax_bfloat16",
        "attention is in bfloat16 ({})",
        ATTENTION,
        {
            "the softmax": attend(softmax=_softmax_in_bfloat16),
            "the probabilities": attend(probabilities=in_bfloat16),
            "the scores": attend(scores=in_bfloat16),
            "scores and probabilities": attend(scores=in_bfloat16, probabilities=in_bfloat16),
            "scores and softmax": attend(scores=in_bfloat16, softmax=_softmax_in_bfloat16),
            "queries, keys and values": _on_heads(_rounded_operands),
            "what it returns": _on_heads(
                lambda q, k, v: (q, k, v), lambda out, _: in_bfloat16(out)
            ),
        },
        rounds=True,
    ),
]
