"""Who may attend to whom: as compact data, and as booleans for a block of queries and keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.attention.zigzag import ZigZag


class AttentionMask(NamedTuple):
    """What decides whether a query sees a key, in memory linear in the sequence length.

    Attributes:
        query_slots, key_slots: indices into the sequence (or cache), not rotary positions. None for both if
            queries and keys are the same tokens, 0, 1, 2, ... or in `order`: then it is known at trace time
            what lies beyond a block.
        key_is_token: False for padding; None if there is none.
        query_segments, key_segments: packed documents; None for both if there is one per row.
        order: of the tokens, and so of all arrays along the sequence; None for that of the row.
        visible_until: the last query slot that sees each key; None if all later ones do.
    """

    query_slots: Int[Array, " q"] | None = None
    key_slots: Int[Array, " k"] | None = None
    key_is_token: Bool[Array, "batch k"] | None = None
    query_segments: Int[Array, "batch q"] | None = None
    key_segments: Int[Array, "batch k"] | None = None
    order: ZigZag | None = None
    visible_until: Int[Array, "batch k"] | None = None


def attention_mask(
    query_slots: Int[Array, " q"],
    key_slots: Int[Array, " k"],
    key_is_token: Bool[Array, "batch k"] | None,
    query_segments: Int[Array, "batch q"] | None,
    key_segments: Int[Array, "batch k"] | None,
    visible_until: Int[Array, "batch k"] | None = None,
) -> Bool[Array, "b_or_1 1 q k"]:
    """True where a query sees a key: causal, the key is a token still visible, and of the same segment.

    The batch axis is 1 if nothing depends on the row.
    """
    mask = (key_slots[None, :] <= query_slots[:, None])[None, None]
    if key_is_token is not None:
        mask = mask & key_is_token[:, None, None, :]
    if query_segments is not None:
        assert key_segments is not None
        mask = mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    if visible_until is not None:
        mask = mask & (query_slots[None, None, :, None] <= visible_until[:, None, None, :])
    return mask


def slots_of(mask: AttentionMask, q: int, k: int) -> tuple[Int[Array, " {q}"], Int[Array, " {k}"]]:
    """The slots of `q` queries and `k` keys as arrays."""
    if mask.query_slots is not None and mask.key_slots is not None:
        return mask.query_slots, mask.key_slots
    if mask.order is not None:
        return jnp.asarray(mask.order.slots(q)), jnp.asarray(mask.order.slots(k))
    return jnp.arange(q, dtype=jnp.int32), jnp.arange(k, dtype=jnp.int32)


def dense_mask(mask: AttentionMask, q: int, k: int) -> Bool[Array, "b_or_1 1 q k"]:
    """The full `attention_mask`, for implementations that hold the scores anyway."""
    return attention_mask(
        *slots_of(mask, q, k),
        mask.key_is_token,
        mask.query_segments,
        mask.key_segments,
        mask.visible_until,
    )


def sees_something(mask: AttentionMask, q: int, k: int, block: int) -> Bool[Array, "b_or_1 q"]:
    """Whether a query sees any key at all, computed for `block` queries at a time."""
    query_slots, key_slots = slots_of(mask, q, k)
    segments = mask.query_segments

    def sees_any(query: tuple[Array, Array | None]) -> Array:
        slot, segment = query
        segment = None if segment is None else segment[:, None]
        visible = attention_mask(
            slot[None],
            key_slots,
            mask.key_is_token,
            segment,
            mask.key_segments,
            mask.visible_until,
        )
        return jnp.any(visible, axis=(1, 2, 3))

    per_query = (query_slots, None if segments is None else segments.T)
    return jax.lax.map(sees_any, per_query, batch_size=block).T


def causal_shares(
    length: int, shards: int, order: ZigZag | None, block_q: int = 1, block_k: int = 1
) -> Float[np.ndarray, " {shards}"]:
    """Of each shard's queries, the fraction of all blocks of queries and keys that causality leaves.

    The keys of all shards are in the order of the row, the queries in `order`.
    """
    slots = np.arange(length) if order is None else order.slots(length)
    last = slots.reshape(shards, -1, block_q).max(2)
    return (last // block_k + 1).mean(1) / (length // block_k)
