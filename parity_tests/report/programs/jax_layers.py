"""llama_jax's program: its modules, one layer at a time."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import Tensor

from llama_jax import LlamaForCausalLM
from llama_jax.attention import masks
from llama_jax.attention.masks import AttentionMask
from llama_jax.checkpoints import huggingface
from llama_jax.models import causal_lm, decoder, layers
from parity_tests.report.programs.checkpoint import EMBEDDING, NORM, Checkpoint, read, read_layer
from parity_tests.report.programs.jax_steps import Arrays, call_layer, decoder_layer, layer_steps
from parity_tests.report.programs.program import Gradients, Steps
from parity_tests.report.programs.steps import LAYER_STEPS, OUTPUT
from parity_tests.report.programs.tensors import as_torch


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
        return decoder_layer(self.config, tensors, self.dtype)


@jax.jit
def _run_layer(layer: Any, x: jax.Array, cos: jax.Array, sin: jax.Array) -> Arrays:
    mask = AttentionMask()
    return layer_steps(layer, x, cos, sin, mask) | {OUTPUT: call_layer(layer, x, cos, sin, mask)}


@jax.jit
def _layer_vjp(layer: Any, x: jax.Array, cos: jax.Array, sin: jax.Array, cotangent: Any) -> Any:
    def run(layer: Any, x: jax.Array) -> jax.Array:
        return call_layer(layer, x, cos, sin, AttentionMask())

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
