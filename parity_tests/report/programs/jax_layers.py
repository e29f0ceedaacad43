"""llama_jax's own modules, a layer at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from llama_jax import LlamaConfig
from llama_jax.attention import masks
from llama_jax.attention.masks import AttentionMask
from llama_jax.checkpoints import huggingface
from llama_jax.models import causal_lm, decoder, layers
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.program import LAYER_STEPS, Program, Steps, as_torch

Arrays = dict[str, jax.Array]


class OneLayer(nnx.Module):
    """A stack of one decoder layer, so that it is loaded as a model's are."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.layers = layers.DecoderLayer(config, stack=(1,), dtype=dtype, rngs=rngs)


def program(checkpoint: Checkpoint, dtype: Any, length: int) -> Program:
    """Ours on the checkpoint's weights, weights and computation in `dtype`."""
    config = checkpoint.config
    cos, sin = decoder.rope_cos_sin(
        jnp.arange(length, dtype=jnp.int32)[None],
        config.rope,
        config.head_size,
        config.max_position_embeddings,
        jnp.dtype(dtype),
    )

    def weight(name: str) -> jax.Array:
        return jnp.asarray(read(checkpoint, name, dtype))

    def embedding() -> decoder.Embedding:
        module = nnx.eval_shape(
            lambda: decoder.Embedding(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        )
        module.weight = nnx.Param(weight(EMBEDDING))
        return module

    def decoder_layer(index: int) -> layers.DecoderLayer:
        tensors = {
            f"layers.0.{name}": tensor
            for name, tensor in read_layer(checkpoint, index, dtype).items()
        }
        one = huggingface.from_hf_tensors(OneLayer, config, tensors, dtype)
        return jax.tree.map(lambda stacked: stacked[0], one.layers)

    def ends() -> Steps:
        mask = masks.dense_mask(AttentionMask(), length, length)[0, 0]
        both = {"rotary.cos": cos, "rotary.sin": sin}
        halves = {name: jnp.concatenate([half, half], axis=-1)[0] for name, half in both.items()}
        return {name: _as_torch(array) for name, array in {"mask": mask, **halves}.items()}

    def embed(ids: np.ndarray) -> jax.Array:
        return embedding()(jnp.asarray(ids, jnp.int32))

    def layer(index: int, x: jax.Array) -> tuple[Steps, jax.Array]:
        steps = _run_layer(decoder_layer(index), x, cos, sin)
        return {name: _as_torch(steps[name]) for name in LAYER_STEPS}, steps[""]

    def norm(x: jax.Array) -> jax.Array:
        return layers.rms_norm(x, weight(NORM), config.rms_norm_eps)

    def head() -> Callable[[jax.Array, int, int], torch.Tensor]:
        kernel = weight(checkpoint.head)
        return lambda hidden, first, last: _as_torch(
            layers.linear(hidden[0, first:last], kernel, None)
        )

    def loss_of(hidden: jax.Array, ids: np.ndarray) -> float:
        labels = causal_lm.shift_labels(jnp.asarray(ids, jnp.int32))
        return float(causal_lm.causal_lm_loss(hidden, weight(checkpoint.head), labels, None))

    def head_vjp(x: jax.Array, ids: np.ndarray) -> tuple[jax.Array, Steps]:
        labels = causal_lm.shift_labels(jnp.asarray(ids, jnp.int32))
        names = NORM, checkpoint.head
        of_x, *rest = _head_vjp(x, *map(weight, names), labels, config.rms_norm_eps)
        return of_x, dict(zip(names, map(_as_torch, rest), strict=True))

    def layer_vjp(index: int, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, Steps]:
        of_layer, of_x = _layer_vjp(decoder_layer(index), x, cos, sin, cotangent)
        return of_x, {name: _as_torch(array) for name, array in huggingface.to_hf_tensors(of_layer)}

    def embed_vjp(ids: np.ndarray, cotangent: jax.Array, head: torch.Tensor | None) -> torch.Tensor:
        tokens = jnp.asarray(ids, jnp.int32)
        _, pull = jax.vjp(lambda module: module(tokens), embedding())
        gradient = _as_torch(pull(cotangent)[0].weight[...])
        return gradient if head is None else gradient + head

    return Program(
        "llama_jax",
        ends,
        embed,
        layer,
        norm,
        head,
        loss_of,
        head_vjp,
        layer_vjp,
        embed_vjp,
        _as_torch,
        lambda x: jnp.asarray(x.float().numpy(), dtype),
    )


def layer_steps(
    layer: layers.DecoderLayer,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: AttentionMask,
    inputs: Mapping[str, jax.Array] | None = None,
) -> Arrays:
    """Every intermediate of a decoder layer by `LAYER_STEPS`, its modules run one after the other.

    Args:
        x [B, T, H]; cos, sin [B, T, D / 2].
        inputs: what each module takes in place of what ours gave out; by the same names, and "middle"
            for the sum after attention.
    """
    attn, mlp = layer.self_attn, layer.mlp
    got: Arrays = {}
    of = got if inputs is None else inputs
    split = (*x.shape[:2], -1, attn.head_dim)
    got["input_layernorm"] = layer.input_layernorm(x)
    for p in "qkv":
        got[f"self_attn.{p}_proj"] = getattr(attn, f"{p}_proj")(of["input_layernorm"])
    for p in "qk":
        projected = of[f"self_attn.{p}_proj"].reshape(split)
        got[f"self_attn.rotate.{p}"] = layers.rotate(projected, cos, sin)
    q, k, v = of["self_attn.rotate.q"], of["self_attn.rotate.k"], of["self_attn.v_proj"]
    mixed, _ = layers.attention(q, k, v.reshape(split), mask)
    got["self_attn.attention"] = mixed.reshape(*x.shape[:2], -1)
    got["self_attn.o_proj"] = attn.o_proj(of["self_attn.attention"])
    got["middle"] = x + got["self_attn.o_proj"]
    got["post_attention_layernorm"] = layer.post_attention_layernorm(of["middle"])
    got["mlp.gate_proj"] = mlp.gate_proj(of["post_attention_layernorm"])
    got["mlp.up_proj"] = mlp.up_proj(of["post_attention_layernorm"])
    act = layers.ACTIVATIONS[mlp.hidden_act]
    got["mlp.act"] = act(of["mlp.gate_proj"]) * of["mlp.up_proj"]
    got["mlp.down_proj"] = mlp.down_proj(of["mlp.act"])
    got[""] = _call_layer(layer, x, cos, sin, mask)
    return got


def _call_layer(
    layer: layers.DecoderLayer, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: AttentionMask
) -> jax.Array:
    zero = jnp.int32(0)
    return layer(x, cos, sin, mask, None, zero, zero, None)[0]


@jax.jit
def _run_layer(layer: Any, x: jax.Array, cos: jax.Array, sin: jax.Array) -> Arrays:
    return layer_steps(layer, x, cos, sin, AttentionMask())


@jax.jit
def _layer_vjp(layer: Any, x: jax.Array, cos: jax.Array, sin: jax.Array, cotangent: Any) -> Any:
    def run(layer: Any, x: jax.Array) -> jax.Array:
        return _call_layer(layer, x, cos, sin, AttentionMask())

    return jax.vjp(run, layer, x)[1](cotangent)


@partial(jax.jit, static_argnums=4)
def _head_vjp(x: jax.Array, norm: jax.Array, head: jax.Array, labels: Any, eps: float) -> Any:
    def loss(x: jax.Array, norm: jax.Array, head: jax.Array) -> jax.Array:
        return causal_lm.causal_lm_loss(layers.rms_norm(x, norm, eps), head, labels, None)

    return jax.grad(loss, argnums=(0, 1, 2))(x, norm, head)


def _as_torch(array: Any) -> torch.Tensor:
    return as_torch(np.array(array))
