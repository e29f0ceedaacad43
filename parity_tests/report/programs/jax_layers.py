"""llama_jax's program: its modules, one layer at a time."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import Tensor

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.attention import masks
from llama_jax.attention.masks import AttentionMask
from llama_jax.checkpoints import huggingface
from llama_jax.models import causal_lm, decoder, layers
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.program import LAYER_STEPS, OUTPUT, Gradients, Steps
from parity_tests.report.programs.tensors import as_torch

Arrays = dict[str, jax.Array]


class JaxProgram:
    """llama_jax's Llama, weights and computation in `dtype`."""

    name = "llama_jax"

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, checkpoint.config, jnp.dtype(dtype)

    def mask_and_rotary(self, length: int) -> Steps:
        mask = masks.dense_mask(AttentionMask(), length, length)[0, 0]
        cos, sin = (jnp.concatenate([half, half], axis=-1)[0] for half in self._cos_sin(length))
        return _tensors({"mask": mask, "rotary.cos": cos, "rotary.sin": sin})

    def embed(self, ids: np.ndarray) -> Tensor:
        return _tensor(self._embedding()(jnp.asarray(ids, jnp.int32)))

    def layer(self, index: int, hidden: Tensor) -> Steps:
        cos, sin = self._cos_sin(hidden.shape[1])
        steps = _run_layer(self._layer(index), self._array(hidden), cos, sin)
        return _tensors({name: steps[name] for name in LAYER_STEPS})  # jit sorts by name

    def norm(self, hidden: Tensor) -> Tensor:
        norm = layers.rms_norm(self._array(hidden), self._weight(NORM), self.config.rms_norm_eps)
        return _tensor(norm)

    def logits(self, hidden: Tensor, block: int) -> Iterator[Tensor]:
        head = self._weight(self.checkpoint.head)
        for rows in hidden[0].split(block):
            yield _tensor(layers.linear(self._array(rows), head, None))

    def loss(self, hidden: Tensor, ids: np.ndarray) -> float:
        head = self._weight(self.checkpoint.head)
        return float(causal_lm.causal_lm_loss(self._array(hidden), head, _labels(ids), None))

    def head_vjp(self, hidden: Tensor, ids: np.ndarray) -> tuple[Tensor, Gradients]:
        names = NORM, self.checkpoint.head
        norm, head = map(self._weight, names)
        of_hidden, *rest = _head_vjp(
            self._array(hidden), norm, head, _labels(ids), self.config.rms_norm_eps
        )
        return _tensor(of_hidden), _tensors(dict(zip(names, rest, strict=True)))

    def layer_vjp(self, index: int, hidden: Tensor, cotangent: Tensor) -> tuple[Tensor, Gradients]:
        cos, sin = self._cos_sin(hidden.shape[1])
        of_layer, of_hidden = _layer_vjp(
            self._layer(index), self._array(hidden), cos, sin, self._array(cotangent)
        )
        return _tensor(of_hidden), _tensors(dict(huggingface.to_hf_tensors(of_layer)))

    def embed_vjp(self, ids: np.ndarray, cotangent: Tensor) -> Tensor:
        tokens = jnp.asarray(ids, jnp.int32)
        _, pullback = jax.vjp(lambda module: module(tokens), self._embedding())
        return _tensor(pullback(self._array(cotangent))[0].weight[...])

    def generate(self, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        model = LlamaForCausalLM.from_pretrained(self.checkpoint.directory, dtype=self.dtype)
        return np.asarray(model.generate(jnp.asarray(prompt, jnp.int32), max_new_tokens=new_tokens))

    def _array(self, tensor: Tensor) -> jax.Array:
        return jnp.asarray(tensor.float().numpy(), self.dtype)

    def _weight(self, name: str) -> jax.Array:
        return jnp.asarray(read(self.checkpoint, name, self.dtype))

    def _cos_sin(self, length: int) -> tuple[jax.Array, jax.Array]:
        """[1, T, D / 2] each."""
        return decoder.rope_cos_sin(
            jnp.arange(length, dtype=jnp.int32)[None],
            self.config.rope,
            self.config.head_size,
            self.config.max_position_embeddings,
            self.dtype,
        )

    def _embedding(self) -> decoder.Embedding:
        module = nnx.eval_shape(
            lambda: decoder.Embedding(self.config, dtype=self.dtype, rngs=nnx.Rngs(0))
        )
        module.weight = nnx.Param(self._weight(EMBEDDING))
        return module

    def _layer(self, index: int) -> layers.DecoderLayer:
        tensors = read_layer(self.checkpoint, index, self.dtype)
        tensors = {f"layers.0.{name}": tensor for name, tensor in tensors.items()}
        stack = huggingface.from_hf_tensors(_OneLayer, self.config, tensors, self.dtype)
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
    inputs: Mapping[str, jax.Array] | None = None,
) -> Arrays:
    """Every intermediate of a decoder layer by `LAYER_STEPS`, its modules run one after the other.

    Args:
        x [B, T, H]; cos, sin [B, T, D / 2].
        inputs: what each module reads instead of what the modules before it returned, by the same names;
            `after_attention` is the sum of x and `self_attn.o_proj`.
    """
    attn, mlp = layer.self_attn, layer.mlp
    steps: Arrays = {}
    inputs = steps if inputs is None else inputs
    heads = (*x.shape[:2], -1, attn.head_dim)
    steps["input_layernorm"] = layer.input_layernorm(x)
    for p in "qkv":
        steps[f"self_attn.{p}_proj"] = getattr(attn, f"{p}_proj")(inputs["input_layernorm"])
    for p in "qk":
        projected = inputs[f"self_attn.{p}_proj"].reshape(heads)
        steps[f"self_attn.rotate.{p}"] = layers.rotate(projected, cos, sin)
    q, k = inputs["self_attn.rotate.q"], inputs["self_attn.rotate.k"]
    mixed, _ = layers.attention(q, k, inputs["self_attn.v_proj"].reshape(heads), mask)
    steps["self_attn.attention"] = mixed.reshape(*x.shape[:2], -1)
    steps["self_attn.o_proj"] = attn.o_proj(inputs["self_attn.attention"])
    steps["after_attention"] = x + steps["self_attn.o_proj"]
    normed = layer.post_attention_layernorm(inputs["after_attention"])
    steps["post_attention_layernorm"] = normed
    steps["mlp.gate_proj"] = mlp.gate_proj(inputs["post_attention_layernorm"])
    steps["mlp.up_proj"] = mlp.up_proj(inputs["post_attention_layernorm"])
    act = layers.ACTIVATIONS[mlp.hidden_act]
    steps["mlp.act"] = act(inputs["mlp.gate_proj"]) * inputs["mlp.up_proj"]
    steps["mlp.down_proj"] = mlp.down_proj(inputs["mlp.act"])
    steps[OUTPUT] = _call_layer(layer, x, cos, sin, mask)
    return steps


def _call_layer(
    layer: layers.DecoderLayer, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: AttentionMask
) -> jax.Array:
    return layer(x, layers.LayerCall(cos, sin, mask)).hidden


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


def _labels(ids: np.ndarray) -> jax.Array:
    return causal_lm.shift_labels(jnp.asarray(ids, jnp.int32))


def _tensor(array: Any) -> Tensor:
    return as_torch(np.array(array))


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: _tensor(array) for name, array in arrays.items()}
