"""The key/value cache: a plain pytree of static shape, passed in and returned."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import LlamaConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of the tokens seen so far.

    keys, values: one slot per token, `capacity` slots. is_token: False in slots of padding. segments:
    the packed segment of each slot. length: how many slots are written, equal for every row.
    """

    keys: Float[Array, "layers batch capacity kv_heads dim"]
    values: Float[Array, "layers batch capacity kv_heads dim"]
    is_token: Bool[Array, "batch capacity"]
    segments: Int[Array, "batch capacity"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Slots per row: the longest sequence that fits."""
        return self.keys.shape[2]


def init_cache(config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens.

    Takes 2 * layers * batch * capacity * kv_heads * head_dim elements of `dtype`.
    """
    shape = (config.num_hidden_layers, batch, capacity, config.kv_heads, config.head_size)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        is_token=jnp.zeros((batch, capacity), bool),
        segments=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def extend_cache(
    cache: KVCache,
    is_token: Bool[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
) -> KVCache:
    """The cache with `seq` further slots taken; their keys and values are written layer by layer."""
    start = (jnp.zeros((), jnp.int32), cache.length)
    return KVCache(
        keys=cache.keys,
        values=cache.values,
        is_token=jax.lax.dynamic_update_slice(cache.is_token, is_token, start),
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, start),
        length=cache.length + is_token.shape[1],
    )


def last_segment(cache: KVCache) -> Int[Array, "batch 1"]:
    """The segment of each row's newest slot, 0 in an empty cache."""
    newest = jnp.maximum(cache.length - 1, 0)
    return jax.lax.dynamic_index_in_dim(cache.segments, newest, axis=1)


def write_layer(
    store: Float[Array, "layers batch capacity kv_heads dim"],
    layer: Int[Array, ""],
    start: Int[Array, ""],
    new: Float[Array, "batch seq kv_heads dim"],
) -> tuple[
    Float[Array, "layers batch capacity kv_heads dim"], Float[Array, "batch capacity kv_heads dim"]
]:
    """Write one layer's new keys (or values) at `start`; returns the store and that layer of it."""
    zero = jnp.zeros((), jnp.int32)
    new = new.astype(store.dtype)
    store = jax.lax.dynamic_update_slice(store, new[None], (layer, zero, start, zero, zero))
    return store, jax.lax.dynamic_index_in_dim(store, layer, axis=0, keepdims=False)
