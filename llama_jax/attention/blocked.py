"""Attention one block of queries at a time: any dtype, no scores of the full sequence.

The backward pass of FlashAttention (arXiv:2205.14135, 2307.08691): it keeps the output and two numbers per
row, and recomputes the scores. The two are the maximum and the sum of exponentials instead of their
logsumexp, which rounds more coarsely than either. Each block of queries takes all of its keys, up to the
causal frontier, in one matmul, so no running maximum is needed and half of the work is skipped.

It is plain XLA, but where the processor has kernels for it (`flash`). A backward pass needs scores that
were rounded as its own are, so both passes are kernels or neither is: of a row that sums to 1 in the
kernel's rounding, XLA's gradient of the values had 1.14 instead of 0.49 times PyTorch's error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llama_jax.attention import masks
from llama_jax.attention.flash import (
    flash_attention,
    flash_gradients,
    takes_flash,
    takes_flash_gradients,
)
from llama_jax.attention.masks import AttentionMask, slots_of
from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.matmul import einsum, working_dtype

# Blocks with different frontiers are separate code. Beyond this many, neighbors share the frontier of the
# last of them and run as one loop: the program stays small, and 9/16 of the work is done instead of 1/2.
_MAX_FRONTIERS = 8


class _Group(NamedTuple):
    """Blocks [first, end), which see no key at or beyond `frontier`."""

    first: int
    end: int
    frontier: int


class _Blocks(NamedTuple):
    """Queries, one block after the other."""

    query: Array  # [blocks, batch, kv_heads, group, size, dim]
    slots: Array  # [blocks, size]
    segments: Array | None  # [blocks, batch, size]


class _Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    query: Array
    key: Array
    value: Array
    mask: AttentionMask
    out: Array
    row_max: Array  # [batch, q, heads, 1]
    row_sum: Array


def blocked_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    block: int | None = None,
) -> Float[Array, "batch q heads dim"]:
    """`dot_product_attention` without the weights. Differentiable once, in reverse mode.

    Scores, softmax and sums are float32 (float64 for float64). At most the scores of `block` queries are
    held, [batch, heads, block, k].

    Args:
        block: queries at a time; default: `default_block()`.
    """
    seq = query.shape[1]
    # as few blocks as `block` allows, of one size that is a multiple of 8
    count = -(-seq // (block or default_block()))
    size = -(-seq // (8 * count)) * 8
    return _attend(size, query, key, value, mask)


def default_block() -> int:
    """Queries per block: measured on CPUs; accelerators want larger matmuls."""
    return 128 if target_platform() == "cpu" else 512


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(size: int, query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    in_blocks, operands = partial(_forward_in_blocks, size), (query, key, value, mask)
    if takes_flash(query, key, value):
        return flash_attention(*operands, in_blocks)[0]
    return in_blocks(*operands)[0]


def _forward(
    size: int, query: Array, key: Array, value: Array, mask: AttentionMask
) -> tuple[Array, _Residuals]:
    in_blocks, operands = partial(_forward_in_blocks, size), (query, key, value, mask)
    if takes_flash_gradients(query, key, value):
        results = flash_attention(*operands, in_blocks)
    else:
        results = in_blocks(*operands)
    out, row_max, row_sum = checkpoint_name(results, "attention")
    return out, _Residuals(query, key, value, mask, out, row_max, row_sum)


def _forward_in_blocks(
    size: int, query: Array, key: Array, value: Array, mask: AttentionMask
) -> list[Array]:
    """The output, and the maximum and the sum of exponentials of each row, [batch, q, heads, 1]."""
    blocks, keys = _split_queries(size, query, key, mask), key.swapaxes(1, 2)
    values = value.swapaxes(1, 2)
    parts = []
    for group in _groups(size, query, key, mask):
        visible = keys[:, :, : group.frontier], values[:, :, : group.frontier]
        step = partial(_forward_block, *visible, _keys_until(group.frontier, key, query, mask))
        parts.append(_scan_blocks(step, None, group, blocks)[1])
    return [_join(jnp.concatenate(part), query) for part in zip(*parts, strict=True)]


def _forward_block(
    keys: Array, values: Array, mask: AttentionMask, carry: None, block: _Blocks
) -> tuple[None, tuple[Array, Array, Array]]:
    scores, visible = _scores(keys, mask, block)
    row_max = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - row_max), 0)
    row_sum = jnp.sum(weights, axis=-1, keepdims=True)
    # a row that sees nothing sums to 0 and has an output of zeros
    row_sum = jnp.where(row_sum == 0, 1, row_sum)
    out = einsum("bngqk,bnkd->bngqd", weights.astype(values.dtype), values, out_dtype=scores.dtype)
    return carry, ((out / row_sum).astype(values.dtype), row_max, row_sum)


def _backward(size: int, residuals: _Residuals, d_out: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, mask, out, row_max, row_sum = residuals
    working = working_dtype(query.dtype)
    # FlashAttention's delta = rowsum(dO * O)
    delta = jnp.sum(out.astype(working) * d_out.astype(working), axis=-1, keepdims=True)
    in_blocks = partial(_backward_in_blocks, size)
    operands = query, key, value, mask, row_max, row_sum, delta, d_out
    if takes_flash_gradients(query, key, value):
        d_query, d_key, d_value = flash_gradients(*operands, plain=in_blocks)
    else:
        d_query, d_key, d_value = in_blocks(*operands)
    return d_query, d_key, d_value, None


def _backward_in_blocks(
    size: int,
    query: Array,
    key: Array,
    value: Array,
    mask: AttentionMask,
    row_max: Array,
    row_sum: Array,
    delta: Array,
    d_out: Array,
) -> list[Array]:
    working = working_dtype(query.dtype)
    of_rows = (_split(size, array, key.shape[2]) for array in (d_out, row_max, row_sum, delta))
    blocks = _BackwardBlocks(_split_queries(size, query, key, mask), *of_rows)
    keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
    d_keys, d_values = jnp.zeros(keys.shape, working), jnp.zeros(values.shape, working)
    parts = []
    for group in _groups(size, query, key, mask):
        until = slice(0, group.frontier)
        visible = keys[:, :, until], values[:, :, until]
        step = partial(_backward_block, *visible, _keys_until(group.frontier, key, query, mask))
        sums = d_keys[:, :, until], d_values[:, :, until]
        (d_visible_keys, d_visible_values), part = _scan_blocks(step, sums, group, blocks)
        d_keys = d_keys.at[:, :, until].set(d_visible_keys)
        d_values = d_values.at[:, :, until].set(d_visible_values)
        parts.append(part)
    d_query = _join(jnp.concatenate(parts), query)
    d_key = d_keys.astype(key.dtype).swapaxes(1, 2)
    return [d_query, d_key, d_values.astype(value.dtype).swapaxes(1, 2)]


class _BackwardBlocks(NamedTuple):
    """What the backward pass reads of the queries, one block after the other."""

    blocks: _Blocks
    d_out: Array  # [blocks, batch, kv_heads, group, size, dim]
    row_max: Array  # [blocks, batch, kv_heads, group, size, 1]
    row_sum: Array
    delta: Array


def _backward_block(
    keys: Array,
    values: Array,
    mask: AttentionMask,
    sums: tuple[Array, Array],
    inputs: _BackwardBlocks,
) -> tuple[tuple[Array, Array], Array]:
    """Add this block's gradients of the keys and values to `sums`; that of its queries is returned."""
    block, d_out, row_max, row_sum, delta = inputs
    d_keys, d_values = sums
    scores, visible = _scores(keys, mask, block)
    working, dtype, scale = scores.dtype, keys.dtype, keys.shape[-1] ** -0.5
    weights = jnp.where(visible, jnp.exp(scores - row_max) / row_sum, 0)
    d_weights = einsum("bngqd,bnkd->bngqk", d_out, values, out_dtype=working)
    d_scores = (weights * (d_weights - delta) * scale).astype(dtype)
    d_query = einsum("bngqk,bnkd->bngqd", d_scores, keys)

    def sum_over_queries(scores: Array, vectors: Array) -> Array:
        rows = (*scores.shape[:2], -1)  # one sum over the heads of a group and the queries
        flat = scores.reshape(*rows, scores.shape[-1]), vectors.reshape(*rows, vectors.shape[-1])
        return einsum("bnqk,bnqd->bnkd", *flat, out_dtype=working)

    d_keys = d_keys + sum_over_queries(d_scores, block.query)
    d_values = d_values + sum_over_queries(weights.astype(dtype), d_out)
    return (d_keys, d_values), d_query


_attend.defvjp(_forward, _backward)


def _scores(keys: Array, mask: AttentionMask, block: _Blocks) -> tuple[Array, Array]:
    """Scores [batch, kv_heads, group, size, k], the lowest finite number where masked; what is visible."""
    working = working_dtype(keys.dtype)
    assert mask.key_slots is not None
    scores = einsum("bngqd,bnkd->bngqk", block.query, keys, out_dtype=working)
    visible = masks.attention_mask(
        block.slots,
        mask.key_slots,
        mask.key_is_token,
        block.segments,
        mask.key_segments,
        mask.visible_until,
    )[:, :, None]
    return jnp.where(visible, scores * keys.shape[-1] ** -0.5, jnp.finfo(working).min), visible


def _groups(size: int, query: Array, key: Array, mask: AttentionMask) -> list[_Group]:
    """Blocks grouped by frontier; with explicit slots, which are traced, every block sees every key."""
    count, keys = -(-query.shape[1] // size), key.shape[1]
    if mask.query_slots is not None:
        return [_Group(0, count, keys)]
    step = -(-count // _MAX_FRONTIERS)
    ends = [min(first + step, count) for first in range(0, count, step)]
    return [
        _Group(first, end, min(end * size, keys))
        for first, end in zip(range(0, count, step), ends, strict=True)
    ]


def _keys_until(frontier: int, key: Array, query: Array, mask: AttentionMask) -> AttentionMask:
    """The key side of the mask for the first `frontier` keys."""
    _, key_slots = slots_of(mask, query.shape[1], key.shape[1])
    is_token, segments, until = mask.key_is_token, mask.key_segments, mask.visible_until
    return AttentionMask(
        key_slots=key_slots[:frontier],
        key_is_token=None if is_token is None else is_token[:, :frontier],
        key_segments=None if segments is None else segments[:, :frontier],
        visible_until=None if until is None else until[:, :frontier],
    )


def _scan_blocks(
    step: Callable[[Any, Any], Any], carry: Any, group: _Group, arrays: Any
) -> tuple[Any, Any]:
    """Scan `step` over the blocks of a group; a single block leaves no loop."""
    blocks = jax.tree.map(lambda array: array[group.first : group.end], arrays)
    return jax.lax.scan(step, carry, blocks, unroll=group.end - group.first == 1)


def _split_queries(size: int, query: Array, key: Array, mask: AttentionMask) -> _Blocks:
    """Queries in blocks; the padding of the last block has slots before every key and sees none."""
    query_slots, _ = slots_of(mask, query.shape[1], key.shape[1])
    slots = _pad(size, query_slots, 0, -1).reshape(-1, size)
    segments = mask.query_segments
    if segments is not None:
        segments = _pad(size, segments, 1, 0)
        segments = segments.reshape(segments.shape[0], -1, size).swapaxes(0, 1)
    return _Blocks(_split(size, query, key.shape[2]), slots, segments)


def _split(size: int, array: Array, kv_heads: int) -> Array:
    """[batch, q, heads, dim] to [blocks, batch, kv_heads, group, size, dim]."""
    array = _pad(size, array, 1, 0)
    batch, _, heads, dim = array.shape
    return array.reshape(batch, -1, size, kv_heads, heads // kv_heads, dim).transpose(
        1, 0, 3, 4, 2, 5
    )


def _join(blocks: Array, query: Array) -> Array:
    """The inverse of `_split`, for as many queries and heads as `query` has."""
    batch, seq, heads, _ = query.shape
    joined = blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, blocks.shape[-1])
    return joined[:, :seq]


def _pad(size: int, array: Array, axis: int, value: int) -> Array:
    missing = -array.shape[axis] % size
    if not missing:
        return array
    widths = [(0, missing if dimension == axis else 0) for dimension in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value)
