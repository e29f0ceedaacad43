"""Mistakes in attention: projections' rows, heads, masks, scores and softmax."""

import math
from collections.abc import Callable
from functools import partial
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
    in_halves,
    of_number,
    one,
    rounded_to,
    several,
)
from parity_tests.reference import oracle
from parity_tests.reference.oracle import rms_norm
from parity_tests.traces.sections import Inputs

ATTENTION = ("self_attn.attention",)
Q, K, V = (f"self_attn.{p}_proj" for p in "qkv")


def _same(x: Tensor) -> Tensor:
    return x


def _first(x: Tensor, _: Tensor) -> Tensor:
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


def _hidden(
    scores: Callable[[Tensor, Tensor], Tensor], after: Callable[[Tensor, Tensor], Tensor] = _first
) -> Change:
    """Another way to hide keys: other scores, of those and of what is visible, or other probabilities."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        s = scores(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), visible)
        p = after(torch.softmax(s, dim=-1), visible)
        return p @ v, p

    return Change(functions={"attention": lambda _: attention}, future=True)


def _over_heads(*, of_group: bool) -> Change:
    """Hidden scores, equally low in all heads, then hide nothing."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        groups = k.shape[1]
        group = q.shape[1] // groups
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        s = s.masked_fill(~visible, torch.finfo(torch.float32).min)
        p = s.unflatten(1, (groups, -1)).softmax(2).flatten(1, 2) if of_group else s.softmax(1)
        return p @ v, p

    return Change(functions={"attention": lambda _: attention}, future=True)


def _transposed_mask(visible: Tensor, _: Any) -> Tensor:
    return visible.transpose(-1, -2)


def _chunks(_: Config, inputs: Inputs) -> Variants:
    length = inputs.ids.shape[1]
    for size in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        if size < length:
            at = torch.arange(length) // size
            yield size, _visible(partial(_shown_where, at[:, None] == at))


def _shown_where(same: Tensor, visible: Tensor, _: Any) -> Tensor:
    return visible & same


def _mask_added(_: Config, inputs: Inputs) -> Variants:
    if inputs.attention_mask is not None:
        mask = torch.from_numpy(inputs.attention_mask.astype(np.float64))[:, None, None]

        def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Any:
            group, keys = q.shape[1] // k.shape[1], k.shape[2]
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask[..., :keys].to(q.dtype)
            p = torch.softmax(s.masked_fill(~visible, torch.finfo(torch.float32).min), dim=-1)
            return p @ v, p

        yield (
            "",
            Change(
                inputs=lambda i: i._replace(attention_mask=None),
                functions={"attention": lambda _: attention},
            ),
        )


def _blind(_: Config, inputs: Inputs) -> Variants:
    """Of queries that see no key, those before the text of a row that is padded on the left."""
    if inputs.attention_mask is None or np.asarray(inputs.attention_mask)[:, 0].all():
        return
    lowest = torch.finfo(torch.float32).min
    yield (
        "is set to a finite number",
        _hidden(lambda scores, sees: scores.masked_fill(~sees, lowest)),
    )
    yield "has a finite number added", _hidden(lambda scores, sees: scores + lowest * ~sees)


def _window(size: int) -> Change:
    return _visible(lambda visible, _: visible & torch.ones_like(visible).triu(1 - size))


def _windows(_: Config, inputs: Inputs) -> Variants:
    length = inputs.ids.shape[1]
    sizes = {2**n for n in range(1, 14)} | {2**n + 1 for n in range(1, 14)} | {1, 10, 20, 100, 1000}
    sizes |= set(range(4, 33, 4)) | set(range(40, 129, 8))
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


def columns(name: str, change: Callable[[Tensor, Config], Tensor]) -> Change:
    """Other columns of a projection: `change` is called with them as rows."""

    def weights(weights: Weights, fields: Config, _: Any) -> Weights:
        return {
            n: change(w.T, fields).T if n.endswith(f"{name}.weight") else w
            for n, w in weights.items()
        }

    return Change(weights=weights)


def _for_query_heads(*changes: Callable[[Tensor, Config], Tensor]) -> Change:
    """Rows of k reordered as if it had the query heads, each with fewer features."""

    def change(w: Tensor, fields: Config) -> Tensor:
        small = len(w) // fields["num_attention_heads"]
        if small % 2:
            raise ValueError("no pairs of features")
        for own in changes:
            w = own(w, dict(fields) | {"head_dim": small})
        return w

    return rows((K,), change)


def _with_own_heads(
    change: Callable[[Tensor, Config], Tensor], fields: Config
) -> Callable[[Tensor, Config], Tensor]:
    return lambda w, _: change(w, fields)


def _k_for_query_heads(fields: Config, _: Inputs) -> Variants:
    if fields["num_key_value_heads"] == fields["num_attention_heads"]:
        return
    own = {f: _with_own_heads(f, fields) for f in (_metas_order, _from_metas_order)}
    yield "", _for_query_heads(_metas_order)
    yield " (from Meta's order)", _for_query_heads(_from_metas_order)
    yield (
        " into Meta's order, and with its own back",
        _for_query_heads(_metas_order, own[_from_metas_order]),
    )
    yield (
        " from Meta's order, and with its own before",
        _for_query_heads(own[_metas_order], _from_metas_order),
    )


def biases(names: tuple[str, ...], change: Callable[[Tensor, Config], Tensor]) -> Change:
    """Other biases of these projections, whose weights are right."""

    def weights(weights: Weights, fields: Config, _: Any) -> Weights:
        return {
            name: change(value, fields)
            if name.endswith(".bias") and any(f"{n}." in name for n in names)
            else value
            for name, value in weights.items()
        }

    return Change(weights=weights)


_QKV = ("q", "k", "v")


def _fused(
    pack: Callable[[list[Tensor], list[int]], Tensor],
    unpack: Callable[..., list[Tensor]],
    *,
    pairs: bool,
) -> Change:
    """Queries', keys' and values' rows are packed in one layout and unpacked in another.

    Both are called with rows and the numbers of rows of the three. pairs: q and k are in Meta's order.
    """

    def weights(weights: Weights, fields: Config, _: Any) -> Weights:
        def reordered(three: list[Tensor], change: Callable[..., Tensor]) -> list[Tensor]:
            q, k, v = three
            return [change(q, fields), change(k, fields), v] if pairs else three

        result = dict(weights)
        for leaf in ("weight", "bias"):
            names = [n for p in _QKV for n in weights if n.endswith(f"self_attn.{p}_proj.{leaf}")]
            if len(names) == len(_QKV):
                sizes = [len(weights[n]) for n in names]
                fused = pack(reordered([weights[n] for n in names], _metas_order), sizes)
                three = reordered(unpack(fused, sizes), _from_metas_order)
                result |= dict(zip(names, three, strict=True))
        return result

    return Change(weights=weights)


def _pack(parts: int) -> Callable[[list[Tensor], list[int]], Tensor]:
    """The three side by side in each of so many parts."""

    def pack(three: list[Tensor], _: list[int]) -> Tensor:
        return torch.cat([x.unflatten(0, (parts, -1)) for x in three], dim=1).flatten(0, 1)

    return pack


def _unpack(parts: int) -> Callable[[Tensor, list[int]], list[Tensor]]:
    def unpack(fused: Tensor, sizes: list[int]) -> list[Tensor]:
        split = fused.unflatten(0, (parts, -1)).split([size // parts for size in sizes], dim=1)
        return [x.flatten(0, 1) for x in split]

    return unpack


def _pack_in(order: tuple[int, ...]) -> Callable[[list[Tensor], list[int]], Tensor]:
    return lambda three, _: torch.cat([three[i] for i in order])


def _fused_layouts(fields: Config, _: Inputs) -> Variants:
    groups = fields["num_key_value_heads"]
    parts = {n: f"in {n} parts of the three" for n in (2, 4, 8, 16) if groups % n == 0}
    if groups > 1:
        parts[groups] = "one key/value head after the other, each with its query heads"
    layouts: dict[str, tuple[Any, Any]] = {}
    for count, words in parts.items():
        layouts[f"packed {words}, but read side by side"] = _pack(count), _unpack(1)
        layouts[f"packed side by side, but read {words}"] = _pack(1), _unpack(count)
    for order in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        words = ", ".join(_QKV[i] for i in order)
        layouts[f"in the order {words}"] = _pack_in(order), _unpack(1)
    for words, layout in layouts.items():
        yield words, _fused(*layout, pairs=False)
        yield f"{words} (with q and k in Meta's order)", _fused(*layout, pairs=True)


def _features_first(w: Tensor, fields: Config) -> Tensor:
    """[D, heads] read as [heads, D]."""
    return w.unflatten(0, (-1, oracle.head_dim(fields))).transpose(0, 1).flatten(0, 1)


def _heads_in_reverse(w: Tensor, fields: Config) -> Tensor:
    return w.unflatten(0, (-1, oracle.head_dim(fields))).flip(0).flatten(0, 1)


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


def _features_in_front(steps: Steps, value: Tensor) -> Tensor:
    """[heads, D] as [D, heads]."""
    return value.unflatten(-1, (-1, oracle.head_dim(steps.fields))).transpose(-1, -2).flatten(-2)


def _softmax_plus_one(scores: Tensor) -> Tensor:
    zero = scores.new_zeros((*scores.shape[:-1], 1))
    return torch.softmax(torch.cat((scores, zero), dim=-1), dim=-1)[..., :-1]


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, x.new_ones(x.shape[-1]), 1e-6)


def _capped(cap: float) -> Change:
    return attend(scores=lambda s: cap * torch.tanh(s / cap))


def _first_head(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def _softmax_in(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda scores: torch.softmax(scores.to(dtype), dim=-1).to(scores.dtype)


def _attention_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"softmax_{half}",
        f"attention is in {half} ({{}})",
        ATTENTION,
        {
            "the softmax": attend(softmax=_softmax_in(dtype)),
            "the probabilities": attend(probabilities=narrow),
            "the scores": attend(scores=narrow),
            "scores and probabilities": attend(scores=narrow, probabilities=narrow),
            "scores and softmax": attend(scores=narrow, softmax=_softmax_in(dtype)),
            "queries, keys and values": _on_heads(
                lambda q, k, v: (narrow(q), narrow(k), narrow(v))
            ),
            "what it returns": _on_heads(lambda q, k, v: (q, k, v), lambda out, _: narrow(out)),
        },
        rounds=True,
    )


FAULTS: list[Fault] = [
    several(
        "no_qk_permutation",
        "{} rows in Meta's order",
        (Q, K, V),
        {
            "q and k": rows((Q, K), _metas_order),
            "q": rows((Q,), _metas_order),
            "k": rows((K,), _metas_order),
            "q, k and v": rows((Q, K, V), _metas_order),
            "v": rows((V,), _metas_order),
            "the biases' q and k": biases((Q, K), _metas_order),
        },
    ),
    several(
        "qk_permuted_twice",
        "{} rows reordered as if they were in Meta's order",
        (Q, K, V),
        {
            "q and k": rows((Q, K), _from_metas_order),
            "q": rows((Q,), _from_metas_order),
            "k": rows((K,), _from_metas_order),
            "q, k and v": rows((Q, K, V), _from_metas_order),
            "v": rows((V,), _from_metas_order),
            "the biases' q and k": biases((Q, K), _from_metas_order),
        },
    ),
    Fault(
        "k_permuted_for_query_heads",
        "rows of k are reordered with the number of query heads{}",
        (K,),
        _k_for_query_heads,
    ),
    several(
        "o_columns",
        "columns of o_proj are in another order: {}",
        ("self_attn.o_proj",),
        {
            "query heads of a group apart": columns("o_proj", _heads_by_group),
            "query heads of other groups side by side": columns("o_proj", _heads_reversed_group),
            "features before heads": columns("o_proj", _features_first),
            "heads before features": columns("o_proj", _features_last),
            "each head's in Meta's order": columns("o_proj", _metas_order),
            "each head's as if they were in Meta's order": columns("o_proj", _from_metas_order),
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
            "key/value heads in reverse": rows((K, V), _heads_in_reverse),
            "all heads in reverse": rows((Q, K, V), _heads_in_reverse),
        },
    ),
    one("kv_swapped", "k_proj and v_proj are swapped", (K, V), swapped(K, V)),
    one("qk_swapped", "q_proj and k_proj are swapped", (Q, K), swapped(Q, K)),
    Fault("fused_layout", "rows of fused q, k and v are {}", (Q, K, V), _fused_layouts),
    one(
        "kv_heads_tiled",
        "key/value heads are tiled, not repeated: query head n reads head n % K",
        ATTENTION,
        _on_heads(
            lambda q, k, v: (_tiled(q, k.shape[1]), k, v), lambda out, count: _untiled(out, count)
        ),
    ),
    several(
        "heads_of_groups",
        "{} in the order of tiled key/value heads",
        ATTENTION,
        {
            "results of heads are": _on_heads(
                lambda q, k, v: (q, k, v), lambda out, count: _untiled(out, count)
            ),
            "queries are, results are not": _on_heads(
                lambda q, k, v: (_tiled(q, k.shape[1]), k, v)
            ),
        },
    ),
    several(
        "values_are_keys",
        "attention reads keys in place of values{}",
        ATTENTION,
        {
            "": _on_heads(lambda q, k, v: (q, k, k)),
            ", with features in Meta's order": _on_heads(
                lambda q, k, v: (q, k, k.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))
            ),
        },
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
    one("mask_transposed", "the causal mask is transposed", ATTENTION, _visible(_transposed_mask)),
    one(
        "mask_multiplied",
        "scores are multiplied by the mask: hidden ones are 0, not -inf",
        ATTENTION,
        _hidden(lambda scores, visible: scores * visible),
    ),
    one(
        "mask_after_softmax",
        "the mask comes after the softmax, whose sum has the hidden keys",
        ATTENTION,
        _hidden(_first, lambda p, visible: p * visible),
    ),
    of_number(
        "mask_value",
        "hidden scores are -{}, which does not hide them",
        ATTENTION,
        lambda _: (1.0, 10.0, 100.0, 1e-9, 1e-5),
        lambda value: _hidden(lambda scores, visible: scores.masked_fill(~visible, -value)),
    ),
    of_number(
        "mask_value_added",
        "-{} is added to hidden scores, which does not hide them",
        ATTENTION,
        lambda _: (1.0, 10.0, 100.0, 1e-9, 1e-5),
        lambda value: _hidden(lambda scores, visible: scores - value * ~visible),
    ),
    Fault("attention_chunks", "queries see only their chunk of {} tokens", ATTENTION, _chunks),
    Fault(
        "mask_added",
        "attention_mask, 0 and 1, is added to the scores",
        ATTENTION,
        _mask_added,
    ),
    Fault(
        "blind_queries",
        "queries that see no key read the mean of all values: what they do not see {}",
        (V, K, Q, "self_attn.rotate.q", "self_attn.rotate.k"),
        _blind,
        direction="backward",
        convention=True,
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
    several(
        "softmax_over_queries",
        "the softmax is over {}, not keys",
        ATTENTION,
        {
            "queries": attend(softmax=lambda s: torch.softmax(s, dim=-2)),
            "heads": _over_heads(of_group=False),
            "the heads of a group": _over_heads(of_group=True),
        },
    ),
    one("softmax_left_out", "scores have no softmax", ATTENTION, attend(softmax=_same)),
    several(
        "heads_not_transposed",
        "before o_proj, {}",
        ATTENTION,
        {
            "heads are not moved beside their features": Change(steps={ATTENTION[0]: _heads_mixed}),
            "features are in front of heads": Change(steps={ATTENTION[0]: _features_in_front}),
        },
    ),
    one(
        "qk_norm",
        "queries and keys are normalized",
        ATTENTION,
        _on_heads(lambda q, k, v: (_normed(q), _normed(k), v)),
    ),
    *in_halves(_attention_in),
]
