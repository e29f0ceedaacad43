"""The key/value cache: a plain pytree of static shape, passed in and returned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int8

from llama_jax.config import LlamaConfig
from llama_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Store:
    """Keys (or values) in 8 bits: `values` times `scales`, one scale for each token and head."""

    values: Int8[Array, "*slots dim"]
    scales: Float[Array, "*slots"]

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the array it stands for."""
        return self.values.shape


# [layers, batch, capacity, kv_heads, dim], or [batch * kv_heads, capacity, dim] for each layer
Store = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of the tokens seen so far.

    keys, values: one slot per token, `capacity` slots, [layers, batch, capacity, kv_heads, dim] as an array
    or an `Int8Store`. is_token: False in slots of padding. segments: the packed segment of each slot.
    length: how many slots are written, equal for every row.
    """

    keys: Store
    values: Store
    is_token: Bool[Array, "batch capacity"]
    segments: Int[Array, "batch capacity"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Slots per row: the longest sequence that fits."""
        return self.is_token.shape[1]


def init_cache(config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens.

    Takes 2 * layers * batch * capacity * kv_heads * head_dim elements of `dtype`; for int8 also a float32
    scale for each head_dim of them.
    """
    shape = (config.num_hidden_layers, batch, capacity, config.kv_heads, config.head_size)
    axes = ("layers", "batch", "hidden", "kv_heads", "hidden")

    def store() -> Store:
        zeros = constrain(jnp.zeros(shape, dtype), *axes)
        if jnp.dtype(dtype) != jnp.int8:
            return zeros
        return Int8Store(zeros, constrain(jnp.zeros(shape[:-1], jnp.float32), *axes[:-1]))

    return KVCache(
        keys=store(),
        values=store(),
        is_token=jnp.zeros((batch, capacity), bool),
        segments=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def unstack_cache(cache: KVCache) -> KVCache:
    """The cache with a store for each layer, [batch * kv_heads, capacity, dim], for unstacked layers.

    A loop then writes each of them in place, and their products need no transpose.
    """

    def rows(layer: Array) -> Array:
        return jnp.moveaxis(layer, 2, 1).reshape(-1, layer.shape[1], *layer.shape[3:])

    def layers(store: Store) -> tuple[Store, ...]:
        count = store.shape[0]
        return tuple(jax.tree.map(lambda a, i=i: rows(a[i]), store) for i in range(count))

    return KVCache(
        layers(cache.keys), layers(cache.values), cache.is_token, cache.segments, cache.length
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
    store: Store,
    layer: Int[Array, ""] | None,
    start: Int[Array, ""],
    new: Float[Array, "batch seq kv_heads dim"],
) -> tuple[Store, Float[Array, "batch capacity kv_heads dim"]]:
    """Write one layer's new keys (or values) at `start`; returns the store and that layer of it.

    Args:
        store: of all layers or, where `layer` is None, of this one (`unstack_cache`).
    """
    quantized = isinstance(store, Int8Store)
    parts: Any = quantize(new) if quantized else new.astype(store.dtype)
    batch, seq, heads = new.shape[:3]
    zero = jnp.zeros((), jnp.int32)

    def write(old: Array, part: Array) -> Array:
        place: tuple[Array, ...]
        if layer is None:
            part = jnp.moveaxis(part, 2, 1).reshape(batch * heads, seq, *part.shape[3:])
            place = (zero, start, zero)
        else:
            part, place = part[None], (layer, zero, start, zero, zero)
        return jax.lax.dynamic_update_slice(old, part, place[: old.ndim])

    def read(whole: Array) -> Array:
        if layer is None:
            return jnp.moveaxis(whole.reshape(batch, heads, *whole.shape[1:]), 1, 2)
        return jax.lax.dynamic_index_in_dim(whole, layer, axis=0, keepdims=False)

    store = jax.tree.map(write, store, parts)
    found = jax.tree.map(read, store)
    return store, dequantize(found) if quantized else found


def quantize(x: Float[Array, "*slots dim"]) -> Int8Store:
    """To 8 bits, symmetric, the largest of each vector at 127."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127
    values = jnp.round(wide / jnp.where(scales == 0, 1, scales)[..., None])
    return Int8Store(values.astype(jnp.int8), scales)


def dequantize(store: Int8Store) -> Float[Array, "*slots dim"]:
    """The float32 vectors that the store stands for."""
    return store.values.astype(jnp.float32) * store.scales[..., None]
