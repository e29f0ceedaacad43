"""Which blocks a kernel visits, and which of them hold nothing but visible pairs."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from llama_jax.attention.masks import AttentionMask, slots_of
from llama_jax.attention.triton.blocks import Kernels, largest_blocks

_NO_SEGMENT = jnp.iinfo(jnp.int32).min  # of padding, as a key
_LARGEST = jnp.iinfo(jnp.int32).max


class MaskOperands(NamedTuple):
    """What the kernels read of a mask, in whole blocks.

    query_slots, key_slots: places in the row, -1 for queries and the largest number for keys that are there
        to fill a block. query_segments, key_segments: None where there are no documents and no padding.
    """

    query_slots: Int[Array, " q"]
    key_slots: Int[Array, " k"]
    query_segments: Int[Array, "batch q"] | None
    key_segments: Int[Array, "batch k"] | None


def mask_operands(
    kernels: Kernels, batch: int, q: int, k: int, mask: AttentionMask
) -> MaskOperands:
    """Documents and padding of `mask` as one number a token, filled up to whole blocks."""
    query_slots, key_slots = slots_of(mask, q, k)
    query_segments = key_segments = None
    if mask.query_segments is not None or mask.key_is_token is not None:
        query_segments = jnp.zeros((batch, q), jnp.int32)
        key_segments = jnp.zeros((batch, k), jnp.int32)
        if mask.query_segments is not None:
            assert mask.key_segments is not None
            query_segments, key_segments = mask.query_segments, mask.key_segments
        if mask.key_is_token is not None:
            key_segments = jnp.where(mask.key_is_token, key_segments, _NO_SEGMENT)
    block_q, block_k = largest_blocks(kernels)
    return MaskOperands(
        query_slots=fill(query_slots.astype(jnp.int32), 0, block_q, -1),
        key_slots=fill(key_slots.astype(jnp.int32), 0, block_k, _LARGEST),
        query_segments=fill(query_segments, 1, block_q, 0),
        key_segments=fill(key_segments, 1, block_k, _NO_SEGMENT),
    )


def fill(array: Any, axis: int, block: int, value: int) -> Any:
    """`array` filled up to whole blocks along `axis`."""
    if array is None or not (missing := -array.shape[axis] % block):
        return array
    widths = [(0, missing if dimension == axis else 0) for dimension in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value)


class Visible(NamedTuple):
    """Of a block of queries and one of keys: whether some pairs of them may be visible, whether all are."""

    some: Bool[Array, "batch q_blocks k_blocks"]
    all: Bool[Array, "batch q_blocks k_blocks"]


def visible_blocks(mask: MaskOperands, block_q: int, block_k: int) -> Visible:
    """Told by the smallest and the largest slot and segment of each block.

    Segments may be in any order. Where a block's range of them is wider than what it holds, `some` can be
    true without a visible pair; it is never false with one.
    """
    query_slots = mask.query_slots.reshape(-1, block_q)
    key_slots = mask.key_slots.reshape(-1, block_k)
    some = (key_slots.min(1)[None, :] <= query_slots.max(1)[:, None])[None]
    every = (key_slots.max(1)[None, :] <= query_slots.min(1)[:, None])[None]
    if mask.query_segments is None or mask.key_segments is None:
        return Visible(some, every)
    batch = mask.key_segments.shape[0]
    queries = mask.query_segments.reshape(batch, -1, block_q)
    keys = mask.key_segments.reshape(batch, -1, block_k)
    # neither padding nor what fills a block widens its range; both keep `all` false
    is_query = query_slots[None] >= 0
    query_low = jnp.where(is_query, queries, _LARGEST).min(2)[:, :, None]
    query_high = jnp.where(is_query, queries, _NO_SEGMENT).max(2)[:, :, None]
    token_low = jnp.where(keys == _NO_SEGMENT, _LARGEST, keys).min(2)[:, None, :]
    key_low, key_high = keys.min(2)[:, None, :], keys.max(2)[:, None, :]
    return Visible(
        some=some & (token_low <= query_high) & (key_high >= query_low),
        all=every & (key_low == query_high) & (key_high == query_low),
    )


def ranges(visible: Visible) -> Int[Array, "batch rows 4"]:
    """For each row of blocks: first, first of those wholly visible, their end, end.

    All columns from the second number to the third are wholly visible, and all that hold a visible pair
    are from the first to the last. Both ranges can be empty.
    """
    count = visible.some.shape[2]
    column = jnp.arange(count, dtype=jnp.int32)[None, None, :]

    def first_of(columns: Bool[Array, "batch rows columns"]) -> Int[Array, "batch rows"]:
        return jnp.where(columns, column, count).min(2)

    end = jnp.where(visible.some, column + 1, 0).max(2)
    first = jnp.minimum(first_of(visible.some), end)
    full_first = first_of(visible.all)
    full_end = first_of(~visible.all & (column >= full_first[:, :, None]))
    bounds = (first, jnp.minimum(full_first, end), jnp.minimum(full_end, end), end)
    return jnp.stack(bounds, axis=2)
