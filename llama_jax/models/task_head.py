"""Shared by the task models: a projection of hidden states onto a few classes, and its cross-entropy."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.config import LlamaConfig
from llama_jax.loss import fused_linear_cross_entropy
from llama_jax.models.layers import Linear
from llama_jax.numerics.matmul import einsum, working_dtype


def task_head(
    config: LlamaConfig, classes: int, *, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> Linear:
    """The projection [hidden] -> [classes], initialized as in transformers.

    Raises:
        ValueError: no classes.
    """
    if not classes:
        raise ValueError("num_labels: found 0, expected at least one label for this model")
    return Linear(
        config.hidden_size,
        classes,
        ("labels", "embed"),
        use_bias=use_bias,
        slices=1,
        stddev=config.initializer_range,
        stack=(),
        dtype=jnp.dtype(dtype),
        rngs=rngs,
    )


def wide_logits(
    hidden: Float[Array, "*batch hidden"], head: Linear
) -> Float[Array, "*batch classes"]:
    """`head(hidden)` in float32 (float64 for float64)."""
    working = working_dtype(hidden.dtype)
    batch = "abcdefgh"[: hidden.ndim - 1]
    out = einsum(f"{batch}i,oi->{batch}o", hidden, head.weight[...], out_dtype=working)
    if not hasattr(head, "bias"):
        return out
    return out + jnp.broadcast_to(head.bias[...].astype(working), out.shape)


def classification_loss(
    hidden: Float[Array, "*batch hidden"], head: Linear, labels: Int[Array, "*batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy of `head(hidden)` over the labels that are not -100; 0 if there are none."""
    bias = head.bias[...] if hasattr(head, "bias") else None
    return fused_linear_cross_entropy(
        hidden, head.weight[...], labels, bias=bias, vocab_axis=0
    ).loss
