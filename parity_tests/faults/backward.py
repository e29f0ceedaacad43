"""Mistakes in the backward pass alone: all values are right."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.faults.attention import attend
from parity_tests.faults.change import (
    Change,
    Config,
    Family,
    Fault,
    Steps,
    Variants,
    in_halves,
    one,
    rounded_to,
    several,
)
from parity_tests.faults.norms import NORMS
from parity_tests.faults.rotary import ROTATED
from parity_tests.reference import oracle
from parity_tests.report.programs.checkpoint import NORM
from parity_tests.traces.sections import Inputs

_BRANCHES = {"after_attention": ("x", "self_attn.o_proj"), "": ("after_attention", "mlp.down_proj")}
# modules with parameters
_WEIGHTS = ("lm_head", "norm", "self_attn.q_proj", "embed_tokens")


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


def _zero(gradient: Tensor) -> Tensor:
    return gradient * 0


def _value(right: Tensor, of_gradient: Tensor) -> Tensor:
    """One value with the gradient of another."""
    return right.detach() + (of_gradient - of_gradient.detach())


def _loss_times(factor: float) -> Change:
    return Change(steps={"loss": lambda _, loss: with_gradient(loss, lambda g: g * factor)})


def _counts(_: Config, inputs: Inputs) -> Variants:
    tokens, rows = inputs.ids.size, len(inputs.ids)
    counted = max(int((inputs.targets[:, 1:] != -100).sum()), 1)
    yield "the number of tokens", _loss_times(float(tokens))
    yield "the number of labels that count", _loss_times(float(counted))
    yield "the number of rows", _loss_times(float(rows))
    yield "1 / the number of rows", _loss_times(1 / rows)
    yield "the share of tokens that have a label", _loss_times(counted / tokens)
    yield "the share of labels that count", _loss_times(counted / max(tokens - rows, 1))


def _turned_forward(right: Any) -> Any:
    """The gradient is rotated by cos and sin, not by their transpose."""

    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _value(right(x, cos, sin), right(x, cos, -sin))

    return wrong


def _scale_detached(_: Any) -> Any:
    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps).detach() * weight

    return wrong


def _norm_without_weight(right: Any) -> Any:
    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = right(x, torch.ones_like(weight), eps)
        return _value(normed * weight, normed + normed.detach() * weight)

    return wrong


def _before_attention(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Change:
    """Queries, keys and values [B, N, T, D] with other gradients."""

    def replacement(right: Any) -> Any:
        return lambda q, k, v, visible: right(*change(q, k, v), visible)

    return Change(functions={"attention": replacement})


def _detached(*which: int) -> Change:
    """Queries, keys and values are 0, 1 and 2."""

    def change(*operands: Tensor) -> Any:
        return (with_gradient(x, _zero) if i in which else x for i, x in enumerate(operands))

    return _before_attention(change)


def _mean_of_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (with_gradient(x, lambda g: g / group) for x in (k, v))
    return q, k, v


def _one_of_group(index: int) -> Change:
    """Keys and values are repeated before attention, with the gradient of one head of the group."""

    def change(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        heads = (
            [x if i == index % group else with_gradient(x, _zero) for i in range(group)]
            for x in (k, v)
        )
        k, v = (torch.stack(each, dim=2).flatten(1, 2) for each in heads)
        return q, k, v

    return _before_attention(change)


def _scores_times(power: float) -> Change:
    """The gradient of scores has another power of the head's size."""

    def change(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor = q.shape[-1] ** power
        q, k = (with_gradient(x, lambda g: g * factor) for x in (q, k))
        return q, k, v

    return _before_attention(change)


def _softmax_without_sum(scores: Tensor) -> Tensor:
    p = torch.softmax(scores, dim=-1)
    return _value(p, p.detach() * scores.clamp(min=-1e4))


def _gated(change: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]) -> Change:
    """The product in the MLP, of the activation, gate and up."""

    def step(steps: Steps, _: Tensor) -> Tensor:
        gate, up = (steps.read[f"mlp.{name}_proj"] for name in ("gate", "up"))
        return change(oracle.ACTIVATIONS[steps.fields["hidden_act"]], gate, up)

    return Change(steps={"mlp.act": step})


def _residual(change: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Both sums of a layer, of the stream and the branch."""

    def sum_of(names: tuple[str, str]) -> Callable[[Steps, Tensor], Tensor]:
        return lambda steps, _: change(*(steps.read[name] for name in names))

    return Change(steps={step: sum_of(names) for step, names in _BRANCHES.items()})


def _head_weight(steps: Steps) -> Tensor:
    (weight,) = (w for name, w in steps.weights.items() if name != NORM)
    return weight


def _head_frozen(steps: Steps, _: Tensor) -> Tensor:
    return steps.read["norm"] @ with_gradient(_head_weight(steps), _zero).T


def _of_rows(
    of_row: Callable[[Tensor, int, int], Tensor], of_sum: Callable[[Tensor], Tensor]
) -> Change:
    """Gradients of parameters are `of_sum` of a sum over rows of `of_row`.

    That is called with the gradient of a row, its index and the number of rows.
    """

    def each(x: Tensor, weights: list[Tensor], run: Callable[..., Tensor]) -> Tensor:
        weights = [with_gradient(weight, of_sum) for weight in weights]
        outputs = []
        for i in range(len(x)):
            change = partial(lambda i, g: of_row(g, i, len(x)), i)
            own = [with_gradient(weight, change) for weight in weights]
            outputs.append(run(x[i : i + 1], *own))
        return torch.cat(outputs)

    def linear(right: Any) -> Any:
        def wrong(weights: Any, name: str, x: Tensor, *rest: Any) -> Tensor:
            own = [n for n in (f"{name}.weight", f"{name}.bias") if n in weights]

            def run(x: Tensor, *changed: Tensor) -> Tensor:
                return right(dict(zip(own, changed, strict=True)), name, x, *rest)

            return each(x, [weights[n] for n in own], run)

        return wrong

    def rms_norm(right: Any) -> Any:
        return lambda x, weight, eps: each(x, [weight], lambda x, w: right(x, w, eps))

    def embed(right: Any) -> Any:
        return lambda config, table, ids: each(ids, [table], lambda i, w: right(config, w, i))

    def head(steps: Steps, _: Tensor) -> Tensor:
        return each(steps.read["norm"], [_head_weight(steps)], lambda x, w: x @ w.T)

    functions = {"linear": linear, "rms_norm": rms_norm, "embed": embed}
    return Change(functions=functions, steps={"lm_head": head})


def _of_positions(keep: Callable[[int], slice], *, norms_alone: bool) -> Change:
    """Gradients of parameters are of these positions alone, as under sequence parallelism without a sum."""

    def rms_norm(right: Any) -> Any:
        def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return _value_of(right, keep(x.shape[1]), x, weight, eps)

        return wrong

    def linear(right: Any) -> Any:
        def wrong(weights: Any, name: str, x: Tensor, *rest: Any) -> Tensor:
            frozen = {n: w.detach() for n, w in weights.items() if n.startswith(f"{name}.")}
            outputs = right(dict(weights) | frozen, name, x, *rest)
            own = right(weights, name, x, *rest)
            return _at(own, outputs, keep(x.shape[1]))

        return wrong

    functions: dict[str, Any] = {"rms_norm": rms_norm}
    return Change(functions=functions if norms_alone else functions | {"linear": linear})


def _value_of(right: Any, kept: slice, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _at(right(x, weight, eps), right(x, weight.detach(), eps), kept)


def _at(own: Tensor, frozen: Tensor, kept: slice) -> Tensor:
    mask = torch.zeros(own.shape[1], dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask[None, :, None], own, frozen)


def _parts_of_sequence(_: Config, inputs: Inputs) -> Variants:
    for parts in (2, 4, 8):
        for words, number in (("first", 0), ("last", parts - 1)):

            def keep(length: int, parts: int = parts, number: int = number) -> slice:
                return slice(length * number // parts, length * (number + 1) // parts)

            where = f"the {words} 1/{parts} of the sequence"
            if inputs.ids.shape[1] % parts == 0:
                yield f"norms are of {where}", _of_positions(keep, norms_alone=True)
                yield (
                    f"norms and projections are of {where}",
                    _of_positions(keep, norms_alone=False),
                )


_FACTORS = (*(2.0**n for n in range(-7, 8) if n), 3.0, 6.0, 1 / 3, 1 / 6)


def _parameters_times(factor: float) -> Change:
    return _of_rows(_row, lambda g: g * factor)


def _norms_times(factor: float) -> Change:
    def norm(right: Any) -> Any:
        return lambda x, w, eps: right(x, with_gradient(w, lambda g: g * factor), eps)

    return Change(functions={"rms_norm": norm})


def _row(gradient: Tensor, _: int, __: int) -> Tensor:
    return gradient


def _same(x: Tensor) -> Tensor:
    return x


def _rows(_: Config, inputs: Inputs) -> Variants:
    if len(inputs.ids) > 1:
        yield "that of the first row", _of_rows(lambda g, i, n: g * (i == 0), _same)
        yield "that of the last row", _of_rows(lambda g, i, n: g * (i == n - 1), _same)
        yield "the mean over rows", _of_rows(lambda g, i, n: g / n, _same)


def _overwritten(last: bool) -> Change:
    """Only one occurrence of each token gives its row a gradient."""

    def embed(right: Any) -> Any:
        def wrong(config: Config, table: Tensor, ids: Tensor) -> Tensor:
            flat, kept = ids.flatten().tolist(), torch.zeros(ids.numel())
            order = range(len(flat)) if last else reversed(range(len(flat)))
            kept[list({flat[at]: at for at in order}.values())] = 1
            mask = kept.to(table.dtype).view(*ids.shape, 1)
            return with_gradient(right(config, table, ids), lambda g: g * mask)

        return wrong

    return Change(functions={"embed": embed})


def _mean_of_occurrences() -> Change:
    """A token's row has the mean of its gradients, as with `scale_grad_by_freq`."""

    def embed(right: Any) -> Any:
        def wrong(config: Config, table: Tensor, ids: Tensor) -> Tensor:
            share = 1 / ids.flatten().bincount()[ids].to(table.dtype)[..., None]
            return with_gradient(right(config, table, ids), lambda g: g * share)

        return wrong

    return Change(functions={"embed": embed})


def _padding_zero(_: Config, inputs: Inputs) -> Variants:
    if inputs.attention_mask is not None:
        hidden = torch.from_numpy(np.asarray(inputs.attention_mask) == 0)[..., None]
        yield "", Change(steps={"embed_tokens": lambda _, x: x.masked_fill(hidden, 0.0)})


def _ignored(of_logit: float) -> Change:
    """Positions of label -100 have the gradient of one that counts, of token 0 or of none."""

    def loss(right: Any) -> Any:
        def wrong(logits: Tensor, labels: Tensor, count: float | None = None) -> Tensor:
            ignored = labels[:, 1:] == -100
            kept = logits[:, :-1]
            extra = (kept.logsumexp(-1) - of_logit * kept[..., 0])[ignored].sum()
            counted = count or max(int((~ignored).sum()), 1)
            loss = right(logits, labels, count)
            return _value(loss, loss + extra / counted)

        return wrong

    return Change(functions={"causal_lm_loss": loss})


def _frozen_in(name: str) -> Change:
    """Parameters of a function have no gradient."""

    def norm(right: Any) -> Any:
        return lambda x, weight, eps: right(x, with_gradient(weight, _zero), eps)

    def linear(right: Any) -> Any:
        def wrong(weights: Any, name: str, *arguments: Any) -> Tensor:
            bias = f"{name}.bias"
            changed = {bias: with_gradient(weights[bias], _zero)} if bias in weights else {}
            return right(dict(weights) | changed, name, *arguments)

        return wrong

    def embed(right: Any) -> Any:
        return lambda *arguments: with_gradient(right(*arguments), _zero)

    return Change(functions={name: {"rms_norm": norm, "linear": linear, "embed": embed}[name]})


def _parameter_gradient_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"weight_gradient_{half}",
        f"gradients of parameters are {{}} in {half}",
        _WEIGHTS,
        {
            "rounded": _of_rows(lambda g, i, n: g, narrow),
            "summed over rows": _of_rows(lambda g, i, n: narrow(g), narrow),
        },
        rounds=True,
        direction="backward",
    )


def _gradient_in(half: str, dtype: torch.dtype) -> Fault:
    narrow = rounded_to(dtype)
    return several(
        f"gradient_{half}",
        f"gradients of {{}} are in {half}",
        ("lm_head", "norm", "self_attn.attention", "mlp.act"),
        {
            "logits": Change(steps={"lm_head": lambda _, x: with_gradient(x, narrow)}),
            "weights and inputs of projections": Change(
                functions={"linear": lambda right: lambda *a: with_gradient(right(*a), narrow)}
            ),
            "hidden states": _residual(lambda x, y: with_gradient(x + y, narrow)),
        },
        rounds=True,
        direction="backward",
    )


FAULTS: list[Fault] = [
    Fault(
        "gradient_scale",
        "all gradients are multiplied by {}",
        ("lm_head", "norm"),
        _counts,
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
        _detached(0, 1),
        direction="backward",
    ),
    one(
        "kv_gradient_mean",
        "key/value heads get the mean of their query heads' gradients, not the sum",
        (*ROTATED, "self_attn.v_proj"),
        _before_attention(_mean_of_group),
        direction="backward",
    ),
    several(
        "kv_gradient_of_one",
        "key/value heads get the gradient of the {} of their query heads alone",
        (*ROTATED, "self_attn.v_proj"),
        {"first": _one_of_group(0), "last": _one_of_group(-1)},
        direction="backward",
    ),
    several(
        "attention_detached",
        "attention has no gradient for {}",
        (*ROTATED, "self_attn.v_proj"),
        {name: _detached(index) for index, name in enumerate(("queries", "keys", "values"))},
        direction="backward",
    ),
    one(
        "softmax_gradient_without_sum",
        "the gradient of attention's softmax lacks the sum over keys",
        ROTATED,
        attend(softmax=_softmax_without_sum),
        direction="backward",
    ),
    several(
        "scores_gradient_scale",
        "the gradient of attention's scores is scaled {}",
        ROTATED,
        {"twice": _scores_times(-0.5), "not at all": _scores_times(0.5)},
        direction="backward",
    ),
    one(
        "norm_gradient_without_weight",
        "the gradient of what norms read lacks their weight",
        NORMS,
        Change(functions={"rms_norm": _norm_without_weight}),
        direction="backward",
    ),
    several(
        "activation_gradient",
        "the derivative of the activation is {}",
        ("mlp.gate_proj",),
        {
            "the sigmoid alone": _gated(
                lambda f, g, u: _value(f(g), g * torch.sigmoid(g).detach()) * u
            ),
            "1": _gated(lambda f, g, u: _value(f(g), g) * u),
        },
        direction="backward",
    ),
    several(
        "gate_detached",
        "the MLP's {} has no gradient",
        ("mlp.gate_proj", "mlp.up_proj"),
        {
            "gate": _gated(lambda f, g, u: f(with_gradient(g, _zero)) * u),
            "up projection": _gated(lambda f, g, u: f(g) * with_gradient(u, _zero)),
        },
        direction="backward",
    ),
    several(
        "residual_detached",
        "the {} of residual connections has no gradient",
        ("after_attention", "mlp.down_proj"),
        {
            "stream": _residual(lambda x, y: with_gradient(x, _zero) + y),
            "branch": _residual(lambda x, y: x + with_gradient(y, _zero)),
        },
        direction="backward",
    ),
    several(
        "embedding_gradient_overwritten",
        "of a token that occurs several times, the embedding has the gradient of the {} alone",
        ("embed_tokens",),
        {"last": _overwritten(last=True), "first": _overwritten(last=False)},
        direction="backward",
    ),
    one(
        "embedding_gradient_mean",
        "of a token that occurs several times, the embedding has the mean of its gradients",
        ("embed_tokens",),
        _mean_of_occurrences(),
        direction="backward",
    ),
    Fault(
        "embedding_of_padding",
        "embeddings of padding are zero, so that they have no gradient",
        ("embed_tokens",),
        _padding_zero,
        direction="backward",
    ),
    several(
        "parameter_gradient_scale",
        "gradients of {}; those of activations are right",
        _WEIGHTS,
        {
            f"{which} are multiplied by {factor:g}": times(factor)
            for which, times in (("parameters", _parameters_times), ("norms", _norms_times))
            for factor in _FACTORS
        },
        direction="backward",
    ),
    Fault(
        "gradient_of_positions",
        "gradients of {} alone",
        ("norm", "self_attn.q_proj"),
        _parts_of_sequence,
        direction="backward",
    ),
    several(
        "ignored_have_gradients",
        "positions whose label is -100 have the gradient of {}",
        ("lm_head",),
        {"token 0": _ignored(1.0), "no token": _ignored(0.0)},
        direction="backward",
    ),
    several(
        "frozen",
        "{} no gradient",
        _WEIGHTS,
        {
            "the head's weight has": Change(steps={"lm_head": _head_frozen}),
            "the rows of the embedding have": _frozen_in("embed"),
            "the weights of norms have": _frozen_in("rms_norm"),
            "biases have": _frozen_in("linear"),
        },
        direction="backward",
    ),
    Fault(
        "weight_gradient_rows",
        "the gradient of parameters is {}, not the sum over rows",
        _WEIGHTS,
        _rows,
        direction="backward",
    ),
    *in_halves(_parameter_gradient_in),
    *in_halves(_gradient_in),
]
