"""What the report asks of a program: to run a Llama one layer at a time, and back again.

Three modules answer it, each with a function `(checkpoint, dtype, length) -> Program`: `jax_layers`,
`torch_layers` and `oracle_layers`. What a program hands out it also takes back; what is compared, and
what all are given alike, are torch tensors. Weights are read from the checkpoint when a layer is reached,
and dropped with it.

Letters in shapes: T tokens, H hidden, V vocabulary; the batch of one sequence is [1, T, ...].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Steps = dict[str, torch.Tensor]

# The intermediates of a decoder layer in forward order, by the names of Hugging Face's modules; its own
# output, which has the layer's name, comes last.
LAYER_STEPS = (
    "input_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkv"),
    "self_attn.rotate.q",
    "self_attn.rotate.k",
    "self_attn.attention",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.act",
    "mlp.down_proj",
    "",
)


class Program(NamedTuple):
    """name: for people.

    ends: `() -> Steps`, the mask [T, T] and the rotary cos and sin [T, D].
    embed: `ids [1, T] -> hidden states [1, T, H]`.
    layer: `(layer, hidden states) -> (intermediates [1, T, ...], hidden states)`.
    norm: the final one, `hidden states -> hidden states`.
    head: `() -> (hidden states, first, last) -> logits [last - first, V]` of those positions.
    loss: `(hidden states, ids) -> float`, of the labels which are the ids themselves.
    head_vjp: `(hidden states before the norm, ids) -> (their cotangent, gradients)`, of the loss.
    layer_vjp: `(layer, its hidden states, cotangent) -> (cotangent, gradients)`.
    embed_vjp: `(ids, cotangent, head's gradient or None) -> gradient`; with the head's where it is tied.
    as_torch: its hidden states as a torch tensor.
    given: hidden states or a cotangent out of a torch tensor.
    """

    name: str
    ends: Callable[[], Steps]
    embed: Callable[[np.ndarray], Any]
    layer: Callable[[int, Any], tuple[Steps, Any]]
    norm: Callable[[Any], Any]
    head: Callable[[], Callable[[Any, int, int], torch.Tensor]]
    loss: Callable[[Any, np.ndarray], float]
    head_vjp: Callable[[Any, np.ndarray], tuple[Any, Steps]]
    layer_vjp: Callable[[int, Any, Any], tuple[Any, Steps]]
    embed_vjp: Callable[[np.ndarray, Any, Any], torch.Tensor]
    as_torch: Callable[[Any], torch.Tensor]
    given: Callable[[torch.Tensor], Any]


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor that shares its memory, bfloat16 too, which torch has no numpy dtype of."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """What torch calls it."""
    return as_torch(np.zeros(0, dtype)).dtype
