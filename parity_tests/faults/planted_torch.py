"""Faults in transformers' Llama, written without the catalogue."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.models.llama import modeling_llama as llama

from parity_tests.harness.cases import BY_NAME, hf_model, scaled, weights_of
from parity_tests.record_torch import record, recording

Config = dict[str, Any]
BASE = BY_NAME["gqa_3_to_1"].config
ROPE = {
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "hidden_size": 48,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
LONGROPE = {
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 16,
    "factor": 8.0,
}


def _rope(kind: str, fields: Mapping[str, Any]) -> Config:
    config = BASE | scaled(kind, **fields) | ROPE
    config.pop("rope_theta", None)
    return config


CONFIGS: dict[str, Config] = {
    "base": BASE,
    "llama3": _rope("llama3", LLAMA3),
    "yarn": _rope("yarn", YARN),
    "longrope": _rope("longrope", LONGROPE),
    "linear": _rope("linear", {"factor": 4.0}),
    "dynamic": _rope("dynamic", {"factor": 4.0}) | {"max_position_embeddings": 16},
    "biases": BASE | {"attention_bias": True, "mlp_bias": True},
    "gelu": BASE | {"hidden_act": "gelu"},
    "tied": BASE | {"tie_word_embeddings": True},
    "pairs of heads": BY_NAME["gqa_2_to_1"].config,
}


class Plant(NamedTuple):
    """A fault.

    Attributes:
        fault: its name in the catalogue.
        begins: the first array that departs.
        of: the config of the checkpoint, in `CONFIGS`.
        config: fields that the program reads otherwise.
        rope: rotary fields that it reads otherwise; None drops one.
        change: changes the model.
        functions: of transformers' module -> what replaces them.
        inputs: what the recorded program is called with besides ids: labels, mask (left padding),
            positions.
        attention: transformers' name of it.
        direction: of the first departure.
    """

    fault: str
    begins: str
    of: str = "base"
    config: Mapping[str, Any] = {}
    rope: Mapping[str, Any] = {}
    change: Callable[[Any], None] = lambda model: None
    functions: Mapping[str, Any] = {}
    inputs: tuple[str, ...] = ()
    attention: str = "sdpa"
    direction: str = "forward"


def ids_of(seed: int = 0, length: int = 40) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 61, (2, length)))


def _inputs(names: Iterable[str], ids: Tensor) -> dict[str, Tensor]:
    rng = np.random.default_rng(1)
    counts = torch.from_numpy(rng.random(tuple(ids.shape)) > [[0.1], [0.6]])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    every = {"labels": ids.where(counts, -100), "attention_mask": mask}
    return {name: every[name] for name in names}


def record_plants(out: Path, *plants: Plant, seed: int = 0) -> Path:
    """A recording of the model with these faults. Its manifest has the checkpoint's config and digests."""
    right = CONFIGS[plants[0].of]
    config, weights = dict(right), weights_of(right)
    attention, names = "sdpa", list[str]()
    for plant in plants:
        config |= dict(plant.config)
        if plant.rope:
            rope = dict(config["rope_parameters"]) | dict(plant.rope)
            config["rope_parameters"] = {n: v for n, v in rope.items() if v is not None}
        attention = plant.attention if plant.attention != "sdpa" else attention
        names.extend(plant.inputs)
    model = hf_model(config, weights, attention).eval()
    with contextlib.ExitStack() as stack:
        for plant in plants:
            plant.change(model)
            for name, wrong in plant.functions.items():
                stack.enter_context(mock.patch.object(llama, name, wrong))
        ids = ids_of(seed)
        inputs: dict[str, Any] = _inputs(names, ids)
        return record(model, ids, out, **inputs)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _norms(forward: Callable[[Any, Tensor], Tensor], which: str = "norm") -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, llama.LlamaRMSNorm) and which in name:
                module.forward = forward.__get__(module)

    return change


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _eps(value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, llama.LlamaRMSNorm):
                module.variance_epsilon = value

    return change


def _layers(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def of_model(model: Any) -> None:
        for layer in model.model.layers:
            change(layer)

    return of_model


@torch.no_grad()
def _set(linear: Any, function: Callable[[Tensor], Tensor]) -> None:
    linear.weight.copy_(function(linear.weight.clone()))


def _meta(w: Tensor) -> Tensor:
    return w.view(-1, 2, 4, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _qk_meta(layer: Any) -> None:
    _set(layer.self_attn.q_proj, _meta)
    _set(layer.self_attn.k_proj, _meta)


@torch.no_grad()
def _exchange(one: Any, other: Any) -> None:
    kept = one.weight.clone()
    one.weight.copy_(other.weight)
    other.weight.copy_(kept)


def _mlp(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        mlp = layer.mlp
        mlp.forward = lambda x: mlp.down_proj(product(mlp.gate_proj(x), mlp.up_proj(x)))

    return _layers(change)


def _eager(
    scale: float = 1.0,
    cap: float = 0.0,
    repeat: Callable[[Tensor, int], Tensor] = llama.repeat_kv,
    softmax: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
    mask: Callable[[Tensor], Tensor] = lambda m: m,
) -> dict[str, Any]:
    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        k, v = (repeat(x, module.num_key_value_groups) for x in (k, v))
        scores = q @ k.mT * scaling * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        p = softmax(scores + mask(attention_mask))
        return (p @ v).transpose(1, 2).contiguous(), p

    return {"eager_attention_forward": attention}


def _rotary(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Any]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> Any:
        return rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])

    return {"apply_rotary_pos_emb": apply}


def _half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[..., :4]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turned).flatten(-2)


def _parallel(layer: Any) -> None:
    def forward(x: Tensor, **options: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **options)
        return x + attended + layer.mlp(layer.post_attention_layernorm(x))

    layer.forward = forward


def _layer(first: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """`first` of the stream, the branch and the norm of the stream."""

    def change(layer: Any) -> None:
        def forward(x: Tensor, **options: Any) -> Tensor:
            normed = layer.input_layernorm(x)
            middle = first(x, layer.self_attn(hidden_states=normed, **options)[0], normed)
            normed = layer.post_attention_layernorm(middle)
            return first(middle, layer.mlp(normed), normed)

        layer.forward = forward

    return _layers(change)


def _loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.loss_function = lambda logits, labels, vocab_size, **_: loss(logits, labels)

    return change


def _ce(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def _module(name: str, after: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """A module returns something else."""

    def change(model: Any) -> None:
        for path, module in model.named_modules():
            if path.endswith(name):
                right = module.forward
                module.forward = lambda *a, right=right, **o: after(right(*a, **o))

    return change


def _tile(x: Tensor, times: int) -> Tensor:
    return x.repeat(1, times, 1, 1)


def _future(mask: Tensor) -> Tensor:
    return F.pad(mask[..., 1:, :], (0, 0, 0, 1))


def _head_tied(model: Any) -> None:
    embedding = model.model.embed_tokens.weight
    model.lm_head.forward = lambda x: x @ embedding.T


def _without_bias(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            module.forward = lambda x, m=module: F.linear(x, m.weight)


def _scaled_twice(layer: Any) -> None:
    layer.self_attn.scaling *= 8**-0.5


def _ignoring_mask(model: Any) -> None:
    right = model.model.forward
    model.model.forward = lambda *a, attention_mask=None, **o: right(*a, **o)


def _positions_of_mask(model: Any) -> None:
    right = model.model.forward

    def forward(*arguments: Any, attention_mask: Any = None, **options: Any) -> Any:
        options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return right(*arguments, attention_mask=attention_mask, **options)

    model.model.forward = forward


def _moved(by: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        rotary = model.model.rotary_emb
        right = rotary.forward
        rotary.forward = lambda x, position_ids: right(x, position_ids + by)

    return change


def _z(logits: Tensor, labels: Tensor) -> Tensor:
    return _ce(logits, labels) + 1e-3 * logits[:, :-1].logsumexp(-1).pow(2).mean()


LAYER = "layers.0"
COS = "rotary.cos"
NORM1, ATTENTION = f"{LAYER}.input_layernorm", f"{LAYER}.self_attn.attention"
ROTATED, ACT, MIDDLE = f"{LAYER}.self_attn.rotate.q", f"{LAYER}.mlp.act", f"{LAYER}.after_attention"

PLANTS: dict[str, Plant] = {
    "theta 500000": Plant("rope_theta", COS, config={"rope_theta": 5e5}),
    "theta of llama3": Plant("rope_theta", COS, "llama3", rope={"rope_theta": 10000.0}),
    "llama3 dropped": Plant("rope_scaling_dropped", COS, "llama3", rope={"rope_type": "default"}),
    "yarn dropped": Plant("rope_scaling_dropped", COS, "yarn", rope={"rope_type": "default"}),
    "linear dropped": Plant("rope_scaling_dropped", COS, "linear", rope={"rope_type": "default"}),
    "dynamic dropped": Plant("rope_scaling_dropped", COS, "dynamic", rope={"rope_type": "default"}),
    "llama3 as linear": Plant("rope_type", COS, "llama3", rope={"rope_type": "linear"}),
    "llama3 factor": Plant("rope_factor", COS, "llama3", rope={"factor": 32.0}),
    "llama3 low": Plant("rope_low_freq_factor", COS, "llama3", rope={"low_freq_factor": 2.0}),
    "llama3 high": Plant("rope_high_freq_factor", COS, "llama3", rope={"high_freq_factor": 3.0}),
    "llama3 original": Plant(
        "rope_original_max_position_embeddings",
        COS,
        "llama3",
        rope={"original_max_position_embeddings": 128},
    ),
    "linear factor": Plant("rope_factor", COS, "linear", rope={"factor": 3.0}),
    "dynamic factor": Plant("rope_factor", COS, "dynamic", rope={"factor": 2.0}),
    "yarn factor": Plant("rope_factor", COS, "yarn", rope={"factor": 8.0}),
    "yarn beta_fast": Plant("rope_beta_fast", COS, "yarn", rope={"beta_fast": 32.0}),
    "yarn beta_slow": Plant("rope_beta_slow", COS, "yarn", rope={"beta_slow": 0.1}),
    "yarn mscale": Plant("rope_mscale", COS, "yarn", rope={"mscale": 1.0}),
    "yarn mscale_all_dim": Plant("rope_mscale_all_dim", COS, "yarn", rope={"mscale_all_dim": 1.0}),
    "longrope factors": Plant(
        "rope_long_and_short",
        COS,
        "longrope",
        rope={"short_factor": LONGROPE["long_factor"], "long_factor": LONGROPE["short_factor"]},
    ),
    "longrope factor": Plant("rope_factor", COS, "longrope", rope={"factor": 16.0}),
    "positions from 1": Plant("position_off_by_one", COS, change=_moved(1)),
    "positions of tokens": Plant(
        "positions_of_tokens", COS, change=_positions_of_mask, inputs=("attention_mask",)
    ),
    "pairs rotated": Plant("rope_neighbours", ROTATED, functions=_rotary(_pairs)),
    "rotated backwards": Plant(
        "rope_reversed", ROTATED, functions=_rotary(lambda x, c, s: x * c - _half(x) * s)
    ),
    "cos and sin bf16": Plant(
        "rope_bfloat16",
        ROTATED,
        functions=_rotary(lambda x, c, s: x * bf16(c) + _half(x) * bf16(s)),
    ),
    "not rotated, eager": Plant(
        "rope_left_out", ATTENTION, functions=_rotary(lambda x, c, s: x), attention="eager"
    ),
    "eps 1e-6": Plant("norm_eps", NORM1, change=_eps(1e-6)),
    "eps 0.002": Plant("norm_eps", NORM1, change=_eps(0.002)),
    "1 + weight": Plant(
        "norm_weight_plus_one",
        NORM1,
        change=_norms(lambda self, x: (1 + self.weight) * _unit(x, self.variance_epsilon)),
    ),
    "1 + final weight": Plant(
        "norm_weight_plus_one",
        "norm",
        change=_norms(
            lambda self, x: (1 + self.weight) * _unit(x, self.variance_epsilon), "model.norm"
        ),
    ),
    "layer norm": Plant(
        "layer_norm",
        NORM1,
        change=_norms(
            lambda self, x: F.layer_norm(x, x.shape[-1:], self.weight, None, self.variance_epsilon)
        ),
    ),
    "norm bf16": Plant(
        "norm_bfloat16",
        NORM1,
        change=_norms(lambda self, x: self.weight * bf16(_unit(x, self.variance_epsilon))),
    ),
    "norms swapped": Plant(
        "norms_swapped",
        NORM1,
        change=_layers(lambda x: _exchange(x.input_layernorm, x.post_attention_layernorm)),
    ),
    "Meta's rows": Plant(
        "no_qk_permutation", f"{LAYER}.self_attn.q_proj", change=_layers(_qk_meta)
    ),
    "o transposed": Plant(
        "transposed",
        f"{LAYER}.self_attn.o_proj",
        change=_layers(lambda x: _set(x.self_attn.o_proj, lambda w: w.T)),
    ),
    "gate and up swapped": Plant(
        "gate_up_swapped",
        f"{LAYER}.mlp.gate_proj",
        change=_layers(lambda x: _exchange(x.mlp.gate_proj, x.mlp.up_proj)),
    ),
    "o without bias": Plant(
        "biases_dropped", f"{LAYER}.self_attn.o_proj", "biases", change=_without_bias
    ),
    "kv tiled": Plant(
        "kv_heads_tiled", ATTENTION, functions=_eager(repeat=_tile), attention="eager"
    ),
    "scaled twice": Plant("scale_twice", ATTENTION, change=_layers(_scaled_twice)),
    "scaled twice, eager": Plant(
        "scale_twice", ATTENTION, change=_layers(_scaled_twice), attention="eager"
    ),
    "not scaled": Plant("scale_none", ATTENTION, functions=_eager(scale=8**0.5), attention="eager"),
    "scores capped": Plant(
        "attention_softcap", ATTENTION, functions=_eager(cap=5.0), attention="eager"
    ),
    "sees the next": Plant(
        "mask_off_by_one", ATTENTION, functions=_eager(mask=_future), attention="eager"
    ),
    "padding seen": Plant("padding", ATTENTION, change=_ignoring_mask, inputs=("attention_mask",)),
    "softmax bf16": Plant(
        "softmax_bfloat16",
        ATTENTION,
        functions=_eager(softmax=lambda s: s.bfloat16().softmax(-1).float()),
        attention="eager",
    ),
    "gelu": Plant("activation", ACT, change=_mlp(lambda g, u: F.gelu(g) * u)),
    "gelu tanh": Plant(
        "activation", ACT, "gelu", change=_mlp(lambda g, u: F.gelu(g, approximate="tanh") * u)
    ),
    "activation of up": Plant("activation_of_up", ACT, change=_mlp(lambda g, u: g * F.silu(u))),
    "relu squared": Plant("activation", ACT, change=_mlp(lambda g, u: F.relu(g).square() * u)),
    "product bf16": Plant(
        "activation_bfloat16", ACT, change=_mlp(lambda g, u: bf16(F.silu(g) * u))
    ),
    "residual bf16": Plant("residual_bfloat16", MIDDLE, change=_layer(lambda x, y, _: bf16(x + y))),
    "residual times 0.22": Plant(
        "residual_multiplier", MIDDLE, change=_layer(lambda x, y, _: x + 0.22 * y)
    ),
    "residual of norm": Plant("residual_of_norm", MIDDLE, change=_layer(lambda _, y, n: n + y)),
    "parallel": Plant("mlp_beside_attention", MIDDLE, change=_layers(_parallel)),
    "embedding scaled": Plant(
        "embedding_scale", "embed_tokens", change=_module("embed_tokens", lambda x: x * 48**0.5)
    ),
    "embedding bf16": Plant(
        "embedding_bfloat16", "embed_tokens", change=_module("embed_tokens", bf16)
    ),
    "head tied": Plant("head_tied", "lm_head", change=_head_tied),
    "logits scaled": Plant("logits_scale", "lm_head", change=_module("lm_head", lambda x: x / 8)),
    "logits capped": Plant(
        "logits_softcap", "lm_head", change=_module("lm_head", lambda x: 7.5 * torch.tanh(x / 7.5))
    ),
    "no shift": Plant(
        "loss_without_shift",
        "loss",
        change=_loss(lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten())),
    ),
    "mean over all": Plant(
        "mean_over_all_tokens",
        "loss",
        change=_loss(lambda x, y: _ce(x, y, reduction="sum") / y.numel()),
        inputs=("labels",),
    ),
    "mean of means": Plant(
        "mean_of_means",
        "loss",
        change=_loss(lambda x, y: (_ce(x[:1], y[:1]) + _ce(x[1:], y[1:])) / 2),
        inputs=("labels",),
    ),
    "z-loss": Plant("z_loss", "loss", change=_loss(_z)),
    "labels smoothed": Plant(
        "label_smoothing", "loss", change=_loss(lambda x, y: _ce(x, y, label_smoothing=0.03))
    ),
    "vocabulary padded": Plant(
        "vocabulary_padded", "loss", change=_loss(lambda x, y: _ce(F.pad(x, (0, 3)), y))
    ),
}


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, written out; `faults` are mistakes in it by name."""

    def __init__(self, groups: Any, faults: frozenset[str], **settings: Any) -> None:
        super().__init__(groups, settings)
        self.faults = faults

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                decay = max(decays) if "decay_of_norms" in self.faults else group["weight_decay"]
                self._update(p, p.grad, group, decay)

    def _update(self, p: Tensor, g: Tensor, group: Any, decay: float) -> None:
        state, faults = self.state[p], self.faults
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        lr, (b1, b2) = group["lr"], group["betas"]
        if "decay_dropped" in faults:
            decay = 0.0
        if "adam_betas_swapped" in faults:
            b1, b2 = b2, b1
        if "decay_coupled" in faults:
            g = g + decay * p
        else:
            p.mul_(1 - (1.0 if "decay_not_times_rate" in faults else lr) * decay)
        if "adam_moments" in faults:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        m = state["exp_avg"].lerp_(g, 1 - b1)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
        steps = state["step"] + ("adam_step" in faults)
        if "adam_step_again" in faults:
            steps = 1
        c1, c2 = 1 - b1**steps, 1 - b2**steps
        if "bias_correction" in faults:
            c1 = c2 = 1.0
        if "bias_correction_of_second" in faults:
            c2 = 1.0
        if "adam_eps_inside_root" in faults:
            p.sub_(lr * (m / c1) / (v / c2 + group["eps"]).sqrt())
        elif "adam_eps" in faults:
            p.sub_(lr * (m / c1) / ((v / c2).sqrt() + 1e-5))
        else:
            p.sub_(lr * (m / c1) / ((v / c2).sqrt() + group["eps"]))


OPTIMIZER_FAULTS = (
    *("decay_of_norms", "decay_dropped", "decay_coupled", "decay_not_times_rate"),
    *("bias_correction", "bias_correction_of_second", "adam_eps_inside_root", "adam_eps"),
    *("adam_betas_swapped", "adam_step", "adam_moments"),
    *("clip_by_value", "clip_dropped", "clip_of_each"),
)


def record_step(out: Path, fault: str | None, earlier: int = 1) -> Path:
    """A recording of a step of `AdamW` after `earlier` others, with a clipped gradient."""
    model = hf_model(BASE, weights_of(BASE)).eval()
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim > 1]
    norms = [p for p in parameters if p.ndim == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    faults = frozenset([fault] if fault else [])
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    settings["decoupled_weight_decay"] = True  # as torch's own AdamW has it
    optimizer, ids = AdamW(groups, faults, **settings), ids_of()
    before = [p.detach().clone() for p in parameters]
    for _ in range(earlier):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # the checkpoint's weights again
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)

    def clip(*_: Any, **__: Any) -> Tensor:
        for p in parameters:
            assert p.grad is not None
            norm = p.grad.norm()
            if fault == "clip_by_value":
                p.grad.clamp_(-0.01, 0.01)
            if fault == "clip_of_each":
                p.grad.mul_((0.01 / (norm + 1e-6)).clamp(max=1.0))
        return torch.zeros(())

    with recording(model, out) as trace, contextlib.ExitStack() as stack:
        loss = model(input_ids=ids, labels=ids).loss
        trace.loss(loss, labels=ids)
        loss.backward()
        if fault is not None and fault.startswith("clip"):
            stack.enter_context(mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip))
        trace.step(optimizer, max_norm=0.01)
    return out
