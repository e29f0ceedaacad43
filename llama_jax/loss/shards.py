"""How the fused loss is split over a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from llama_jax.loss.operands import Gradients
from llama_jax.loss.options import Options, Shards
from llama_jax.numerics.backend import target_platform
from llama_jax.sharding import BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS, mesh_axes, partition_spec


def sum_over_shards(options: Options, gradients: Gradients) -> Gradients:
    """Tokens see every column, columns see every token: one collective for each gradient.

    Of the sum over tokens of the kernel's gradient, each shard keeps its part of the hidden dimension; the
    parts travel in `options.reduce_dtype`.
    """
    shards = options.shards
    if shards is None:
        return gradients
    hidden, kernel, bias, scale = gradients
    if kernel is not None and shards.tokens:
        kernel = _as_sent(kernel, options.reduce_dtype)
    if hidden is not None and shards.vocab:
        hidden = jax.lax.psum(hidden, shards.vocab)
    if kernel is not None and shards.hidden:
        kernel = jax.lax.psum_scatter(
            kernel, shards.hidden, scatter_dimension=1 - options.sum_vocab_axis, tiled=True
        )
        if options.sum_vocab_axis != options.vocab_axis:
            kernel = kernel.T
    replicas = tuple(axis for axis in shards.tokens if axis not in shards.hidden)
    if replicas:
        kernel = jax.lax.psum(kernel, replicas)
    if kernel is not None:
        kernel = kernel.astype(options.working_dtype)
    if shards.tokens:
        bias, scale = jax.lax.psum((bias, scale), shards.tokens)
    if scale is not None and scale.ndim == 0 and shards.vocab:
        scale = jax.lax.psum(scale, shards.vocab)
    return Gradients(hidden, kernel, bias, scale)


def _as_sent(part: Array, dtype: DTypeLike) -> Array:
    """A shard's part of a sum, rounded to the dtype that it travels in."""
    if part.dtype == dtype:
        return part
    if target_platform() != "cpu":
        return part.astype(dtype)
    # XLA's CPU backend adds up bfloat16 in float32 anyway, but crashes where a `shard_map` asks for it
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(part, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def find_shards(mesh: Mesh | AbstractMesh | None, hidden_shape: tuple[int, ...]) -> Shards | None:
    """How `mesh`, or the ambient mesh, splits the loss; None where no axis splits anything.

    Args:
        hidden_shape: [..., H], the token dimensions and the hidden size.

    Raises:
        ValueError: a token dimension that its mesh axes do not divide.
    """
    axes = mesh_axes(mesh)
    batch, sequence = axes.present(*BATCH_AXES), axes.present(SEQUENCE_AXIS)
    (vocab,) = axes.present(TENSOR_AXIS) or (None,)
    if not (batch or sequence or vocab):
        return None
    *token_shape, hidden_size = hidden_shape
    (embed,) = partition_spec(("embed",), (hidden_size,), axes.sizes)
    if len(token_shape) == 1:
        split: tuple[tuple[str, ...], ...] = (batch + sequence,)
    else:
        split = (batch, sequence, *((),) * (len(token_shape) - 2))
    for dimension, names in zip(token_shape, split, strict=True):
        parts = axes.size(*names)
        if dimension % parts:
            raise ValueError(
                f"labels: found shape {token_shape}, expected {dimension} to be divisible by "
                f"the mesh axes {', '.join(names)} = {parts}"
            )
    tokens = batch + sequence
    return Shards(
        mesh=axes.mesh,
        tokens=tokens,
        token_spec=tuple(names or None for names in split),
        vocab=vocab,
        hidden=(embed,) if isinstance(embed, str) else tuple(embed or ()),
        token_size=axes.size(*tokens),
        vocab_size=axes.size(TENSOR_AXIS),
    )
