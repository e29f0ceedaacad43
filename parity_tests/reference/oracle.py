"""The reference: a short, plain Llama in torch which computes in one dtype throughout.

Hugging Face's model casts norms, softmax and rotary angles to float32 whatever its own dtype. Even in
float64 it has float32's rounding errors, and cannot tell which of two float32 programs is more accurate.
This one can: with `dtype=torch.float64` every number in it has 53 bits. It is written from the papers and
from the meaning of the fields of a Hugging Face `config.json`; `test_oracle.py` compares it with Hugging
Face's model.

Everything is a free function of tensors. A config is the dictionary read from `config.json`, in
either layout (`rope_theta` + `rope_scaling`, or `rope_parameters`). Weights are a dictionary with
Hugging Face's names; autograd runs through them.

Letters in shapes: B batch, T query positions, S key positions, H hidden, N query heads,
K key/value heads, D head_dim, F intermediate size, V vocabulary.

Sources: Llama (arXiv 2302.13971), RMSNorm (1910.07467), rotary embeddings (2104.09864),
grouped-query attention (2305.13245), gated MLPs (2002.05202), linear interpolation of positions
(2306.15595), YaRN and dynamic NTK (2309.00071), LongRoPE (2402.13753), Llama 3 (2407.21783).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]

IGNORE = -100


class OracleOutput(NamedTuple):
    """loss [] or None; logits [B, T', V]; hidden_states (layers + 1) x [B, T, H]; attentions
    layers x [B, N, T, S]."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]


# Activations -------------------------------------------------------------------------------------


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu(x: Tensor) -> Tensor:
    return x * _normal_cdf(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus is linear above 20, an error of 2e-9: too much for float64.
    return torch.logaddexp(x, torch.zeros_like(x))


# Every activation of transformers' ACT2FN without trainable parameters.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda x: _gelu(x).clamp(-10.0, 10.0),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
    "hardswish": lambda x: x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
    "relu": lambda x: x.clamp(min=0.0),
    "relu2": lambda x: x.clamp(min=0.0) ** 2,
    "relu6": lambda x: x.clamp(0.0, 6.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "mish": lambda x: x * torch.tanh(_softplus(x)),
    "sqrtsoftplus": lambda x: _softplus(x).sqrt(),
    "laplace": lambda x: _normal_cdf((x - 0.707107) / 0.282095),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


# Embedding ---------------------------------------------------------------------------------------


def embed(config: Config, table: Tensor, ids: Tensor) -> Tensor:
    """Rows of the table [vocab, hidden]. The row of `pad_token_id` gets no gradient, as in torch."""
    rows, pad = table[ids], config.get("pad_token_id")
    if pad is None:
        return rows
    return torch.where((ids == pad % len(table))[..., None], rows.detach(), rows)


# Rotary position embeddings ----------------------------------------------------------------------


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_settings(config: Config) -> dict[str, Any]:
    """The rotary fields of either config layout as one flat dictionary."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    trained = config.get("original_max_position_embeddings")
    if trained is None:
        trained = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    return rope | {"original_max_position_embeddings": trained}


def inverse_frequencies(
    config: Config, seq_len: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, float]:
    """The angle per position of each pair of features, and the factor on cos and sin.

    `seq_len` is the largest position of the batch plus one; only `dynamic` and `longrope` depend on it.
    Returns ([D / 2] in `dtype`, factor).
    """
    rope, dim = rope_settings(config), head_dim(config)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    trained: int = rope["original_max_position_embeddings"]
    if kind not in ("default", "proportional") and (rope["partial_rotary_factor"] or 1.0) != 1.0:
        raise ValueError(f"rope_type {kind!r} rotates the whole head in Llama")

    def powers(base: float) -> Tensor:
        return base ** (torch.arange(0, dim, 2, dtype=dtype) / dim)

    if kind == "default":
        return 1.0 / powers(theta), 1.0

    if kind == "linear":  # positions are compressed into the trained context
        return 1.0 / powers(theta) / rope["factor"], 1.0

    if kind == "proportional":  # the pairs of lowest frequency do not turn at all
        share = rope["partial_rotary_factor"]
        turning = int((1.0 if share is None else share) * dim // 2)
        keep = torch.arange(dim // 2) < turning
        return keep / powers(theta) / rope.get("factor", 1.0), 1.0

    if kind == "dynamic":  # NTK-aware: the base grows with the sequence, past the trained context
        context, factor = config["max_position_embeddings"], rope["factor"]
        growth = factor * max(seq_len, context) / context - (factor - 1)
        return 1.0 / powers(theta * growth ** (dim / (dim - 2))), 1.0

    if kind == "yarn":
        return _yarn(config, rope, dim, powers(theta))

    if kind == "longrope":
        factor = rope.get("factor") or config["max_position_embeddings"] / trained
        scale = rope.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        stretch = rope["long_factor"] if seq_len > trained else rope["short_factor"]
        return 1.0 / (torch.tensor(stretch, dtype=dtype) * powers(theta)), scale

    if kind == "llama3":
        inv_freq = 1.0 / powers(theta)
        turns = trained * inv_freq / (2 * math.pi)  # full turns within the trained context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        # Few turns: interpolate by `factor`. Many: unchanged. Between: blend linearly in the turns.
        blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - blend) * inv_freq / rope["factor"] + blend * inv_freq, 1.0

    raise ValueError(f"unknown rope_type {kind!r}")


def _yarn(
    config: Config, rope: Mapping[str, Any], dim: int, powers: Tensor
) -> tuple[Tensor, float]:
    """YaRN, "NTK by parts": fast pairs stay, slow ones are interpolated, with a ramp between them."""
    trained = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / trained

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that makes this many turns within the trained context."""
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first = pair_that_turns(rope.get("beta_fast") or 32)
    last = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    ramp = ((torch.arange(dim // 2, dtype=powers.dtype) - first) / width).clamp(0.0, 1.0)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    return ramp / (factor * powers) + (1 - ramp) / powers, scale


def cos_sin(
    config: Config, position_ids: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, [B, T, D]; both halves of D have the same angles."""
    inv_freq, scale = inverse_frequencies(config, int(position_ids.max()) + 1, dtype)
    angles = position_ids[..., None].to(dtype) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [B, heads, T, D] by the angles of cos, sin [B, T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


# The layers --------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def linear(weights: Weights, name: str, x: Tensor, slices: int = 1) -> Tensor:
    """x @ W^T + b with W [out, in]; the sum over `in` is split into `slices`, for `pretraining_tp`."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    parts = zip(x.chunk(slices, dim=-1), weight.chunk(slices, dim=-1), strict=True)
    y = sum((part @ w.T for part, w in parts), start=x.new_zeros(()))
    return y if bias is None else y + bias


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped-query attention. q [B, N, T, D], k and v [B, K, S, D], visible bool [B, 1, T, S].

    Query head n reads key/value head n // (N / K). A query that sees no key returns zero.
    Returns the output [B, N, T, D] and the probabilities [B, N, T, S].
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    lowest = torch.finfo(
        q.dtype
    ).min  # finite, so that a row without keys gives no NaN in the gradient
    probabilities = torch.softmax(scores.masked_fill(~visible, lowest), dim=-1) * visible
    return probabilities @ v, probabilities


def self_attention(
    config: Config,
    weights: Weights,
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor]:
    """Project, rotate, attend, project. x [B, T, H] -> [B, T, H] and probabilities [B, N, T, S]."""
    batch, length, _ = x.shape
    dim = head_dim(config)

    def heads(projection: str) -> Tensor:
        return (
            linear(weights, f"{name}.{projection}", x).view(batch, length, -1, dim).transpose(1, 2)
        )

    q, k, v = rotate(heads("q_proj"), cos, sin), rotate(heads("k_proj"), cos, sin), heads("v_proj")
    mixed, probabilities = attention(q, k, v, visible)
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    return linear(weights, f"{name}.o_proj", mixed, _slices(config)), probabilities


def mlp(config: Config, weights: Weights, name: str, x: Tensor) -> Tensor:
    """The gated MLP: down(act(gate(x)) * up(x)). x [B, T, H] -> [B, T, H]."""
    gate = ACTIVATIONS[config["hidden_act"]](linear(weights, f"{name}.gate_proj", x))
    up = linear(weights, f"{name}.up_proj", x)
    return linear(weights, f"{name}.down_proj", gate * up, _slices(config))


def decoder_layer(
    config: Config,
    weights: Weights,
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    visible: Tensor,
) -> tuple[Tensor, Tensor]:
    """Pre-norm attention and MLP, each added to the residual. x [B, T, H] -> [B, T, H]."""
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, weights[f"{name}.input_layernorm.weight"], eps)
    mixed, probabilities = self_attention(
        config, weights, f"{name}.self_attn", normed, cos, sin, visible
    )
    x = x + mixed
    normed = rms_norm(x, weights[f"{name}.post_attention_layernorm.weight"], eps)
    return x + mlp(config, weights, f"{name}.mlp", normed), probabilities


def _slices(config: Config) -> int:
    return config.get("pretraining_tp") or 1


def visibility(
    batch: int,
    length: int,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Which query sees which key, bool [B, 1, T, T]: no later key, none masked out by `attention_mask`
    [B, T], none of another segment of `segment_ids` [B, T]."""
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, length, length)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return visible


# The model ---------------------------------------------------------------------------------------


def causal_lm_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: float | None = None
) -> Tensor:
    """Cross-entropy of each position's logits [B, T, V] against the next position's label [B, T].

    Labels of -100 are ignored. The sum is divided by `num_items_in_batch` or, if that is None, by the
    number of labels that count. Without any such label the loss is 0, where torch's is NaN.
    """
    targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    counts = targets != IGNORE
    log_probabilities = torch.log_softmax(logits, dim=-1)
    chosen = log_probabilities.gather(-1, targets.where(counts, 0)[..., None])[..., 0]
    total = -chosen.where(counts, 0.0).sum()
    return total / (max(int(counts.sum()), 1) if num_items_in_batch is None else num_items_in_batch)


class Decoded(NamedTuple):
    """hidden_states (layers + 1) x [B, T, H], the last one after the final norm; attentions
    layers x [B, N, T, S]."""

    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]


def decode(
    config: Config,
    weights: Weights,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Decoded:
    """Run the decoder in the dtype of the weights.

    Needs `input_ids` [B, T] or `inputs_embeds` [B, T, H]. `position_ids` [B, T] or [1, T] default to
    0 .. T-1 whatever the mask; they only set the rotary angles.
    """
    embedding = weights["model.embed_tokens.weight"]
    if inputs_embeds is None:
        assert input_ids is not None, "give input_ids or inputs_embeds"
        inputs_embeds = embed(config, embedding, input_ids)
    x = inputs_embeds.to(embedding.dtype)
    batch, length, _ = x.shape
    if position_ids is None:
        position_ids = torch.arange(length)[None]
    cos, sin = cos_sin(config, position_ids, x.dtype)
    visible = visibility(batch, length, attention_mask, segment_ids)

    hidden_states, attentions = [x], []
    for layer in range(config["num_hidden_layers"]):
        x, probabilities = decoder_layer(
            config, weights, f"model.layers.{layer}", x, cos, sin, visible
        )
        hidden_states.append(x)
        attentions.append(probabilities)
    hidden_states[-1] = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return Decoded(tuple(hidden_states), tuple(attentions))


def oracle(
    config: Config,
    weights: Weights,
    *,
    labels: Tensor | None = None,
    num_items_in_batch: int | None = None,
    logits_to_keep: int | Tensor = 0,
    dtype: torch.dtype = torch.float64,
    **inputs: Any,
) -> OracleOutput:
    """Run the causal language model, every step of it in `dtype`.

    `inputs` are those of `decode`. The output projection is `lm_head.weight`, or the embedding if there is
    none (tied). `logits_to_keep`: the number of last positions (0: all), or their indices; the loss always
    includes all positions.
    """
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    hidden_states, attentions = decode(config, weights, **inputs)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = hidden_states[-1] @ head.T
    loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return OracleOutput(loss, logits[:, keep], hidden_states, attentions)
