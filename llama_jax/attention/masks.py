"""Who may attend to whom: described as data, and as booleans for a block of queries and keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class AttentionMask(NamedTuple):
    """What decides whether a query sees a key; its size grows with the sequence, not with its square.

    query_slots, key_slots: places in the sequence (or cache), not positions. None for both where queries
    and keys are the same tokens in their order, 0, 1, 2, ...: then what lies beyond a block is known when
    the program is traced. key_is_token: False for padding; None for none. query_segments, key_segments:
    packed documents; None for both where there is one a row.
    """

    query_slots: Int[Array, " q"] | None = None
    key_slots: Int[Array, " k"] | None = None
    key_is_token: Bool[Array, "batch k"] | None = None
    query_segments: Int[Array, "batch q"] | None = None
    key_segments: Int[Array, "batch k"] | None = None


def attention_mask(
    query_slots: Int[Array, " q"],
    key_slots: Int[Array, " k"],
    key_is_token: Bool[Array, "batch k"] | None,
    query_segments: Int[Array, "batch q"] | None,
    key_segments: Int[Array, "batch k"] | None,
) -> Bool[Array, "b_or_1 1 q k"]:
    """True where a query sees a key: causal, the key is a token, and both belong to one segment.

    The result has a batch axis of 1 where nothing depends on the row.
    """
    mask = (key_slots[None, :] <= query_slots[:, None])[None, None]
    if key_is_token is not None:
        mask = mask & key_is_token[:, None, None, :]
    if query_segments is not None:
        assert key_segments is not None
        mask = mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])
    return mask


def slots_of(mask: AttentionMask, q: int, k: int) -> tuple[Int[Array, " {q}"], Int[Array, " {k}"]]:
    """The slots of `q` queries and `k` keys, written out."""
    if mask.query_slots is not None and mask.key_slots is not None:
        return mask.query_slots, mask.key_slots
    return jnp.arange(q, dtype=jnp.int32), jnp.arange(k, dtype=jnp.int32)


def dense_mask(mask: AttentionMask, q: int, k: int) -> Bool[Array, "b_or_1 1 q k"]:
    """All of `attention_mask`, for programs that hold the scores anyway."""
    return attention_mask(*slots_of(mask, q, k), *mask[2:])


def sees_something(mask: AttentionMask, q: int, k: int, block: int) -> Bool[Array, "b_or_1 q"]:
    """Whether a query sees any key at all, formed for `block` queries at a time."""
    query_slots, key_slots = slots_of(mask, q, k)
    segments = mask.query_segments

    def seen(query: tuple[Array, Array | None]) -> Array:
        slot, own = query
        own = None if own is None else own[:, None]
        visible = attention_mask(slot[None], key_slots, mask.key_is_token, own, mask.key_segments)
        return jnp.any(visible, axis=(1, 2, 3))

    per_query = (query_slots, None if segments is None else segments.T)
    return jax.lax.map(seen, per_query, batch_size=block).T
