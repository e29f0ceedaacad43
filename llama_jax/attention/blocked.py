"""Attention a block of queries at a time, in plain XLA: no scores of the whole sequence, in any dtype.

The backward pass of FlashAttention (arXiv:2205.14135, 2307.08691): it keeps the output and two numbers a
row, and forms the scores again. They are the maximum and the sum of exponentials, not the logsumexp: one
number that holds both is rounded more coarsely than either. A block of queries takes all its keys in one
product, from the first to the causal frontier, so that no running maximum is needed and half of the work
is skipped.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llama_jax.attention import masks
from llama_jax.attention.masks import AttentionMask, slots_of
from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.matmul import einsum, working_dtype

# Blocks of unequal frontiers are separate code. Beyond so many, neighbours share the frontier of the last
# of them and are one loop: the program stays small, and 9/16 of the work is done where 1/2 would do.
_MOST_FRONTIERS = 8


class _Group(NamedTuple):
    """Blocks [first, end) see no key at or beyond `frontier`."""

    first: int
    end: int
    frontier: int


class _Blocks(NamedTuple):
    """Arrays a block of queries at a time."""

    query: Any  # [blocks, batch, kv_heads, group, size, dim]
    slots: Any  # [blocks, size]
    segments: Any  # [blocks, batch, size] or None


def blocked_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    block: int | None = None,
) -> Float[Array, "batch q heads dim"]:
    """`dot_product_attention` without its weights. Differentiable once, in reverse.

    Scores, softmax and sums are float32 (float64 for float64). At most `block` queries' scores are held,
    [batch, heads, block, k].

    Args:
        block: queries at a time; None chooses by the backend.
    """
    seq = query.shape[1]
    # as few blocks as `block` allows, all of one size, of whole vectors
    count = -(-seq // (block or default_block()))
    size = -(-seq // (8 * count)) * 8
    return _attend(size, query, key, value, mask)


def default_block() -> int:
    """Measured on CPUs; an accelerator wants products that fill it."""
    return 128 if target_platform() == "cpu" else 512


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(size: int, query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
    return _forward(size, query, key, value, mask)[0]


def _forward(size: int, query: Array, key: Array, value: Array, mask: AttentionMask):
    blocks, keys = _split_queries(size, query, key, mask), key.swapaxes(1, 2)
    values = value.swapaxes(1, 2)
    parts = []
    for group in _groups(size, query, key, mask):
        seen = keys[:, :, : group.frontier], values[:, :, : group.frontier]
        step = partial(_forward_block, *seen, _keys_until(group.frontier, key, query, mask))
        parts.append(_over_blocks(step, None, group, blocks)[1])
    joined = [jnp.concatenate(part) for part in zip(*parts, strict=True)]
    out, *rows = checkpoint_name([_join(joined[0], query), *joined[1:]], "attention")
    return out, (query, key, value, mask, out, rows)


def _forward_block(keys: Array, values: Array, mask: AttentionMask, carry: None, block: _Blocks):
    scores, visible = _scores(keys, mask, block)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - highest), 0)
    mass = jnp.sum(weights, axis=-1, keepdims=True)
    # a row that sees nothing has no mass, and an output of zeros
    mass = jnp.where(mass == 0, 1, mass)
    out = einsum("bngqk,bnkd->bngqd", weights.astype(values.dtype), values, out_dtype=scores.dtype)
    return carry, ((out / mass).astype(values.dtype), highest, mass)


def _backward(size: int, residuals: tuple[Any, ...], gradient: Array):
    query, key, value, mask, out, rows = residuals
    working = working_dtype(query.dtype)
    # what softmax's derivative subtracts in each row
    along = jnp.sum(out.astype(working) * gradient.astype(working), axis=-1, keepdims=True)
    per_block = (
        _split_queries(size, query, key, mask),
        _split(size, gradient, key.shape[2]),
        rows,
        _split(size, along, key.shape[2]),
    )
    keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
    d_keys, d_values = jnp.zeros(keys.shape, working), jnp.zeros(values.shape, working)
    parts = []
    for group in _groups(size, query, key, mask):
        until = slice(0, group.frontier)
        seen = keys[:, :, until], values[:, :, until]
        step = partial(_backward_block, *seen, _keys_until(group.frontier, key, query, mask))
        so_far = d_keys[:, :, until], d_values[:, :, until]
        (more_keys, more_values), part = _over_blocks(step, so_far, group, per_block)
        d_keys = d_keys.at[:, :, until].set(more_keys)
        d_values = d_values.at[:, :, until].set(more_values)
        parts.append(part)
    d_query = _join(jnp.concatenate(parts), query)
    d_key = d_keys.astype(key.dtype).swapaxes(1, 2)
    return d_query, d_key, d_values.astype(value.dtype).swapaxes(1, 2), None


def _backward_block(keys: Array, values: Array, mask: AttentionMask, carry: Any, given: Any):
    block, gradient, (highest, mass), along = given
    d_keys, d_values = carry
    scores, visible = _scores(keys, mask, block)
    working, dtype, scale = scores.dtype, keys.dtype, keys.shape[-1] ** -0.5
    weights = jnp.where(visible, jnp.exp(scores - highest) / mass, 0)
    d_weights = einsum("bngqd,bnkd->bngqk", gradient, values, out_dtype=working)
    d_scores = (weights * (d_weights - along) * scale).astype(dtype)
    d_query = einsum("bngqk,bnkd->bngqd", d_scores, keys)

    def by_key(of_scores: Array, of_queries: Array) -> Array:
        rows = (*of_scores.shape[:2], -1)  # heads of a group and queries are one sum
        flat = (
            of_scores.reshape(*rows, of_scores.shape[-1]),
            of_queries.reshape(*rows, of_queries.shape[-1]),
        )
        return einsum("bnqk,bnqd->bnkd", *flat, out_dtype=working)

    d_keys = d_keys + by_key(d_scores, block.query)
    d_values = d_values + by_key(weights.astype(dtype), gradient)
    return (d_keys, d_values), d_query


_attend.defvjp(_forward, _backward)


def _scores(keys: Array, mask: AttentionMask, block: _Blocks) -> tuple[Array, Array]:
    """Scores [batch, kv_heads, group, size, k], the lowest number where hidden, and what is visible."""
    working = working_dtype(keys.dtype)
    assert mask.key_slots is not None
    scores = einsum("bngqd,bnkd->bngqk", block.query, keys, out_dtype=working)
    visible = masks.attention_mask(
        block.slots, mask.key_slots, mask.key_is_token, block.segments, mask.key_segments
    )[:, :, None]
    return jnp.where(visible, scores * keys.shape[-1] ** -0.5, jnp.finfo(working).min), visible


def _groups(size: int, query: Array, key: Array, mask: AttentionMask) -> list[_Group]:
    """Where slots are given, and so not known, every block sees every key."""
    count, keys = -(-query.shape[1] // size), key.shape[1]
    if mask.query_slots is not None:
        return [_Group(0, count, keys)]
    step = -(-count // _MOST_FRONTIERS)
    ends = [min(first + step, count) for first in range(0, count, step)]
    return [
        _Group(first, end, min(end * size, keys))
        for first, end in zip(range(0, count, step), ends, strict=True)
    ]


def _keys_until(frontier: int, key: Array, query: Array, mask: AttentionMask) -> AttentionMask:
    """The key side of the mask for the first `frontier` keys."""
    _, key_slots = slots_of(mask, query.shape[1], key.shape[1])
    is_token, segments = mask.key_is_token, mask.key_segments
    return AttentionMask(
        key_slots=key_slots[:frontier],
        key_is_token=None if is_token is None else is_token[:, :frontier],
        key_segments=None if segments is None else segments[:, :frontier],
    )


def _over_blocks(step: Any, carry: Any, group: _Group, arrays: Any) -> tuple[Any, Any]:
    """`step` over the blocks of a group; a single one leaves no loop behind."""
    given = jax.tree.map(lambda array: array[group.first : group.end], arrays)
    return jax.lax.scan(step, carry, given, unroll=group.end - group.first == 1)


def _split_queries(size: int, query: Array, key: Array, mask: AttentionMask) -> _Blocks:
    """Queries in blocks; those that fill up the last block lie before every key and see none."""
    query_slots, _ = slots_of(mask, query.shape[1], key.shape[1])
    slots = _fill(size, query_slots, 0, -1).reshape(-1, size)
    segments = mask.query_segments
    if segments is not None:
        segments = _fill(size, segments, 1, 0)
        segments = segments.reshape(segments.shape[0], -1, size).swapaxes(0, 1)
    return _Blocks(_split(size, query, key.shape[2]), slots, segments)


def _split(size: int, array: Array, kv_heads: int) -> Array:
    """[batch, q, heads, dim] to [blocks, batch, kv_heads, group, size, dim]."""
    array = _fill(size, array, 1, 0)
    batch, _, heads, dim = array.shape
    return array.reshape(batch, -1, size, kv_heads, heads // kv_heads, dim).transpose(
        1, 0, 3, 4, 2, 5
    )


def _join(blocks: Array, query: Array) -> Array:
    """The inverse of `_split`, in the shape of the queries."""
    batch, seq, heads, dim = query.shape
    return blocks.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, dim)[:, :seq]


def _fill(size: int, array: Array, axis: int, value: int) -> Array:
    missing = -array.shape[axis] % size
    if not missing:
        return array
    widths = [(0, missing if dimension == axis else 0) for dimension in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value)
