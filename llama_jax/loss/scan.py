"""Losses and gradients of all tokens: a scan over chunks on every shard."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from llama_jax.loss.chunk import add_chunk
from llama_jax.loss.operands import Gradients, Head, Losses, NeedsGradient, Tokens
from llama_jax.loss.options import Options
from llama_jax.loss.shards import sum_over_shards


# Compiled here, so that calls outside jit compile once per shape; inlined within a caller's jit.
@partial(jax.jit, static_argnums=(0, 1))
def losses_and_gradients(
    options: Options, needs: NeedsGradient, tokens: Tokens, head: Head
) -> tuple[Losses | None, Gradients]:
    """Losses, unless `tokens` has the logsumexp of an earlier pass, and the gradients in `needs`.

    `tokens.weights` multiplies the gradients, not the losses.
    """
    local = partial(_on_one_shard, options, needs)
    shards = options.shards
    if shards is None:
        return local(tokens, head)
    # Any, because specs replace arrays in the same structures
    per_token: Any = PartitionSpec(*shards.token_spec)
    hidden_spec: Any = PartitionSpec(*shards.token_spec, None)
    per_column: Any = PartitionSpec(shards.vocab)

    def kernel_spec(hidden_axes: tuple[str, ...]) -> Any:
        axes = [shards.vocab, hidden_axes or None]
        return PartitionSpec(*(axes if options.vocab_axis == 0 else reversed(axes)))

    scale_by_column = head.scale is not None and head.scale.ndim == 1
    scale_spec: Any = per_column if scale_by_column else PartitionSpec()
    # a vocabulary that the shards do not divide is padded with columns that do not count
    missing = -options.vocab % shards.vocab_size
    padded = head._replace(kernel=pad(head.kernel, options.vocab_axis, missing))
    if head.bias is not None:
        padded = padded._replace(bias=pad(head.bias, 0, missing))
    if head.scale is not None and scale_by_column:
        padded = padded._replace(scale=pad(head.scale, 0, missing))
    token_specs = Tokens(
        hidden=hidden_spec,
        labels=per_token,
        weights=None if tokens.weights is None else per_token,
        logsumexp=None if tokens.logsumexp is None else per_token,
    )
    head_specs = Head(
        kernel=kernel_spec(()),
        bias=None if head.bias is None else per_column,
        scale=None if head.scale is None else scale_spec,
    )
    losses_specs = Losses(*(per_token,) * 3) if tokens.logsumexp is None else None
    gradient_specs = Gradients(
        hidden=hidden_spec if needs.hidden else None,
        kernel=kernel_spec(shards.hidden) if needs.kernel else None,
        bias=per_column if needs.bias else None,
        scale=scale_spec if needs.scale else None,
    )
    losses, gradients = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(token_specs, head_specs),
        out_specs=(losses_specs, gradient_specs),
        axis_names={*shards.tokens, *((shards.vocab,) if shards.vocab else ())},
        check_vma=False,
    )(tokens, padded)
    kernel, bias, scale = gradients.kernel, gradients.bias, gradients.scale
    if kernel is not None:
        kernel = jax.lax.slice_in_dim(kernel, 0, options.vocab, axis=options.vocab_axis)
    if bias is not None:
        bias = bias[: options.vocab]
    if scale is not None and scale_by_column:
        scale = scale[: options.vocab]
    return losses, Gradients(gradients.hidden, kernel, bias, scale)


def _on_one_shard(
    options: Options, needs: NeedsGradient, tokens: Tokens, head: Head
) -> tuple[Losses | None, Gradients]:
    """As `losses_and_gradients`, for the tokens and columns of this shard; sums over the other shards."""
    token_shape = tokens.labels.shape
    count = math.prod(token_shape)
    chunks = -(-count // options.chunk) if count else 1
    missing = chunks * options.chunk - count

    def split(values: Shaped[Array, "..."], fill: int = 0) -> Shaped[Array, "..."]:
        flat = values.reshape(count, *values.shape[len(token_shape) :])
        flat = pad(flat, 0, missing, fill)
        return flat.reshape(chunks, options.chunk, *flat.shape[1:])

    def join(values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        flat = values.reshape(chunks * options.chunk, *values.shape[2:])
        return flat[:count].reshape(*token_shape, *values.shape[2:])

    def zeros(array: Array | None, needed: bool) -> Array | None:
        if array is None or not needed:
            return None
        return jnp.zeros(array.shape, options.working_dtype)

    parts = Tokens(
        hidden=split(tokens.hidden),
        labels=split(tokens.labels, options.ignore_index),
        weights=None if tokens.weights is None else split(tokens.weights),
        logsumexp=None if tokens.logsumexp is None else split(tokens.logsumexp),
    )
    kernel = head.kernel if options.sum_vocab_axis == options.vocab_axis else head.kernel.T
    sums = Gradients(
        kernel=zeros(kernel, needs.kernel),
        bias=zeros(head.bias, needs.bias),
        scale=zeros(head.scale, needs.scale),
    )
    body = partial(add_chunk, options, needs, head)
    sums, (losses, d_hidden) = jax.lax.scan(body, sums, parts)
    losses = None if losses is None else Losses(*map(join, losses))
    gradients = sums._replace(hidden=None if d_hidden is None else join(d_hidden))
    return losses, sum_over_shards(options, gradients)


def pad(
    values: Shaped[Array, "..."], axis: int, missing: int, fill: int = 0
) -> Shaped[Array, "..."]:
    """`missing` more entries at the end of an axis."""
    if not missing:
        return values
    widths = [(0, missing if dimension == axis else 0) for dimension in range(values.ndim)]
    return jnp.pad(values, widths, constant_values=fill)
