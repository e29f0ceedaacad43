"""A decoder layer of llama_jax, its modules run one after the other; needs no torch."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax import LlamaConfig
from llama_jax.attention.masks import AttentionMask
from llama_jax.checkpoints import huggingface
from llama_jax.models import layers
from parity_tests.report.programs.steps import AFTER_ATTENTION, OUTPUT, Read, as_computed

Arrays = dict[str, jax.Array]


def decoder_layer(
    config: LlamaConfig, tensors: Mapping[str, np.ndarray], dtype: Any
) -> layers.DecoderLayer:
    """A layer with these weights, by their names in it."""
    tensors = {f"layers.0.{name}": tensor for name, tensor in tensors.items()}
    stack = huggingface.from_hf_tensors(_OneLayer, config, tensors, dtype)
    return jax.tree.map(lambda stacked: stacked[0], stack.layers)


class _OneLayer(nnx.Module):
    """A stack of one decoder layer, which the library's own reader can fill."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.layers = layers.DecoderLayer(config, stack=(1,), dtype=dtype, rngs=rngs)


def layer_steps(
    layer: layers.DecoderLayer,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: AttentionMask,
    read: Read = as_computed,
) -> Arrays:
    """Every intermediate of a decoder layer by `LAYER_STEPS`.

    Args:
        x [B, T, H]; cos, sin [B, T, D / 2].
        read: what later modules read in place of a step's value.
    """
    attn, mlp = layer.self_attn, layer.mlp
    steps: Arrays = {}
    heads = (*x.shape[:2], -1, attn.head_dim)

    def step(name: str, value: jax.Array) -> Any:
        steps[name] = value
        return read(name, value)

    normed = step("input_layernorm", layer.input_layernorm(x))
    q, k, v = (
        step(f"self_attn.{p}_proj", getattr(attn, f"{p}_proj")(normed)).reshape(heads)
        for p in "qkv"
    )
    q = step("self_attn.rotate.q", layers.rotate(q, cos, sin))
    k = step("self_attn.rotate.k", layers.rotate(k, cos, sin))
    mixed, _ = layers.attention(q, k, v, mask)
    mixed = step("self_attn.attention", mixed.reshape(*x.shape[:2], -1))
    x = read(AFTER_ATTENTION, x + step("self_attn.o_proj", attn.o_proj(mixed)))
    normed = step("post_attention_layernorm", layer.post_attention_layernorm(x))
    gate = step("mlp.gate_proj", mlp.gate_proj(normed))
    up = step("mlp.up_proj", mlp.up_proj(normed))
    product = step("mlp.act", layers.ACTIVATIONS[mlp.hidden_act](gate) * up)
    steps[OUTPUT] = x + step("mlp.down_proj", mlp.down_proj(product))
    return steps


def call_layer(
    layer: layers.DecoderLayer, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: AttentionMask
) -> jax.Array:
    """The output of the layer as the model runs it."""
    return layer(x, layers.LayerCall(cos, sin, mask)).hidden
