"""What the activations of a batch are like, layer by layer, from a forward pass of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from llama_jax.attention.masks import AttentionMask, attention_mask, slots_of
from llama_jax.models.decoder import LlamaModel
from llama_jax.models.layers import DecoderLayer, LayerCall
from llama_jax.numerics.activations import ACTIVATIONS
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.numerics.rope import rope_cos_sin, rotate
from llama_jax.sharding import RESIDUAL_AXES, constrain
from train.data.batch import Batch

# attention is sampled: so many of a layer's heads, and of a row's queries
HEADS, QUERIES = 4, 16
# a unit is dead if its activation stays this close to 0, saturated if its slope does to its limit
CLOSE = 0.01
# where an activation's slope has reached its limit
_FAR = 1e4


class ActivationStatistics(NamedTuple):
    """Statistics of each layer, over all tokens of the batch.

    Attributes:
        residual_rms, residual_max: root mean square and largest magnitude of the layer's output.
        logit_rms, logit_max: the same of attention logits (scores before the softmax) that are not masked,
            over the sampled heads and queries.
        entropy: of the attention weights, in nats, mean over the sampled queries of each sampled head.
        dead_units: share of the MLP's units whose gate lets nothing through, |act(gate)| <= 0.01, for any
            token.
        saturated_units: share of those that are not dead and whose gate does not respond: the slope of the
            activation is within 0.01 of its limit for large, or for very negative, gates, for all tokens.
    """

    residual_rms: Float[Array, " layers"]
    residual_max: Float[Array, " layers"]
    logit_rms: Float[Array, " layers"]
    logit_max: Float[Array, " layers"]
    entropy: Float[Array, "layers heads"]
    dead_units: Float[Array, " layers"]
    saturated_units: Float[Array, " layers"]


class _Sums(NamedTuple):
    """Of one micro-batch, in a form that can be added up."""

    residual_squares: Float[Array, ""]
    residual_max: Float[Array, ""]
    logit_squares: Float[Array, ""]
    logit_max: Float[Array, ""]
    logits: Float[Array, ""]
    entropy: Float[Array, " heads"]
    unit_max: Float[Array, " units"]
    at_upper_limit: Bool[Array, " units"]
    at_lower_limit: Bool[Array, " units"]


def sampled_heads(heads: int) -> np.ndarray:
    """Up to `HEADS` of a layer's heads, evenly spaced."""
    return _spread(heads, HEADS)


def sampled_queries(length: int) -> np.ndarray:
    """Up to `QUERIES` places in a row, evenly spaced, the last one included."""
    return length - 1 - _spread(length, QUERIES)[::-1]


def activation_statistics(
    graphdef: nnx.GraphDef[Any],
    params: Any,
    batch: Batch,
    *,
    compute_dtype: Any,
    attention_implementation: str | None,
) -> ActivationStatistics:
    """The statistics of `params` on a batch of arrays [micro, rows, seq]; one micro-batch at a time.

    They do not depend on the mesh nor on how the batch is divided, but for rounding.
    """
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params))

    def run(part: Batch) -> _Sums:
        return _run_layers(model.model, part, attention_implementation)

    parts = jax.lax.map(run, batch)  # [micro, layers, ...]
    values = batch.labels.size * model.model.config.hidden_size
    queries = (
        batch.labels.shape[0] * batch.labels.shape[1] * len(sampled_queries(batch.labels.shape[2]))
    )
    dead = jnp.max(parts.unit_max, 0) <= CLOSE
    at_limit = jnp.all(parts.at_upper_limit, 0) | jnp.all(parts.at_lower_limit, 0)
    dtype = parts.residual_squares.dtype
    return ActivationStatistics(
        residual_rms=jnp.sqrt(jnp.sum(parts.residual_squares, 0) / values),
        residual_max=jnp.max(parts.residual_max, 0),
        logit_rms=jnp.sqrt(jnp.sum(parts.logit_squares, 0) / jnp.sum(parts.logits, 0)),
        logit_max=jnp.max(parts.logit_max, 0),
        entropy=jnp.sum(parts.entropy, 0) / queries,
        dead_units=jnp.mean(dead, -1, dtype=dtype),
        saturated_units=jnp.mean(at_limit & ~dead, -1, dtype=dtype),
    )


def _run_layers(model: LlamaModel, part: Batch, attention_implementation: str | None) -> _Sums:
    """The sums of each layer, [layers, ...], of a micro-batch [rows, seq]."""
    x, call = layer_inputs(model, part, attention_implementation)

    def run_layer(x: Array, layer: DecoderLayer) -> tuple[Array, _Sums]:
        middle = layer.attend(x, call).hidden
        out = layer.feed_forward(middle, call)
        wide = out.astype(working_dtype(out.dtype))
        return out, _Sums(
            jnp.sum(jnp.square(wide)),
            jnp.max(jnp.abs(wide)),
            *_attention_sums(layer, layer.input_layernorm(x), call),
            *_gate_sums(layer, layer.post_attention_layernorm(middle)),
        )

    assert isinstance(model.layers, DecoderLayer)
    _, sums = jax.lax.scan(run_layer, x, model.layers)
    return sums


def layer_inputs(
    model: LlamaModel, part: Batch, attention_implementation: str | None = None
) -> tuple[Float[Array, "rows seq hidden"], LayerCall]:
    """The embedded tokens of a micro-batch [rows, seq], and what every layer is called with."""
    config = model.config
    x = constrain(model.embed_tokens(part.input_ids), *RESIDUAL_AXES)
    positions = config.max_position_embeddings
    cos, sin = rope_cos_sin(part.position_ids, config.rope, config.head_size, positions, x.dtype)
    segments = part.segment_ids
    mask = AttentionMask(query_segments=segments, key_segments=segments, order=part.order)
    return x, LayerCall(cos, sin, mask, attention_implementation)


def _attention_sums(
    layer: DecoderLayer, x: Array, call: LayerCall
) -> tuple[Array, Array, Array, Array]:
    """Of the logits the sum of squares, the largest magnitude and the number; the entropy of each head."""
    attention, (batch, seq, _) = layer.self_attn, x.shape
    dim = attention.head_dim
    query_slots, key_slots = slots_of(call.mask, seq, seq)
    at = _places(call, seq)
    query = attention.q_proj(x[:, at]).reshape(batch, len(at), -1, dim)
    key = attention.k_proj(x).reshape(batch, seq, -1, dim)
    query = rotate(query, call.cos[:, at], call.sin[:, at])
    key = rotate(key, call.cos, call.sin)
    heads = sampled_heads(query.shape[2])
    query, key = query[:, :, heads], key[:, :, heads * key.shape[2] // query.shape[2]]
    working = working_dtype(x.dtype)
    logits = einsum("bqhd,bkhd->bhqk", query, key, out_dtype=working) * dim**-0.5
    segments = call.mask.key_segments
    assert segments is not None
    visible = attention_mask(query_slots[at], key_slots, None, segments[:, at], segments)
    seen = jnp.where(visible, logits, 0)
    weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(working).min), axis=-1)
    entropy = jax.scipy.special.entr(jnp.where(visible, weights, 0))
    return (
        jnp.sum(jnp.square(seen)),
        jnp.max(jnp.abs(seen)),
        jnp.sum(visible, dtype=working) * len(heads),
        jnp.sum(entropy, axis=(0, 2, 3)),
    )


def _places(call: LayerCall, seq: int) -> np.ndarray:
    """Where the sampled queries are, in the order that the arrays have."""
    order, queries = call.mask.order, sampled_queries(seq)
    return queries if order is None else np.argsort(order.slots(seq))[queries]


def _gate_sums(layer: DecoderLayer, x: Array) -> tuple[Array, Array, Array]:
    """Of each unit the largest |act(gate)|, and whether the slope is at either limit for all tokens."""
    mlp = layer.mlp
    gate = mlp.gate_proj(x)
    gate = gate.astype(working_dtype(gate.dtype))
    activation = ACTIVATIONS[mlp.hidden_act]
    activated, slope = jax.jvp(activation, (gate,), (jnp.ones_like(gate),))
    limits = jax.vmap(jax.grad(activation))(jnp.array([_FAR, -_FAR], gate.dtype))
    upper, lower = (jnp.all(jnp.abs(slope - limit) <= CLOSE, axis=(0, 1)) for limit in limits)
    return jnp.max(jnp.abs(activated), axis=(0, 1)), upper, lower


def _spread(count: int, limit: int) -> np.ndarray:
    """Up to `limit` indices below `count`, evenly spaced from 0 on."""
    number = min(count, limit)
    return np.arange(number) * count // number
