"""The key/value cache: a pytree of static shape that a forward pass takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int8

from llama_jax.config import LlamaConfig
from llama_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Vectors:
    """Keys (or values) in 8 bits: `values` times `scales`, one scale per token and head."""

    values: Int8[Array, "*slots dim"]
    scales: Float[Array, "*slots"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        return self.values.shape


Vectors = Float[Array, "..."] | Int8Vectors


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of the tokens seen so far.

    Attributes:
        keys: one slot per token, [layers, batch, capacity, kv_heads, dim]. Inside `generate`, a tuple with
            one [batch * kv_heads, capacity, dim] per layer.
        values: as `keys`.
        is_token: False for padding.
        segments: the packed segment of each slot.
        length: how many slots are in use, the same for every row.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaModel, init_cache
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaModel(config, rngs=nnx.Rngs(0))
        >>> cache = init_cache(config, batch=1, capacity=16, dtype=jnp.float32)
        >>> cache = model(jnp.array([[5, 6, 7]]), cache=cache).cache
        >>> cache = model(jnp.array([[8]]), cache=cache).cache
        >>> int(cache.length), cache.capacity
        (4, 16)
    """

    keys: Vectors | tuple[Vectors, ...]
    values: Vectors | tuple[Vectors, ...]
    is_token: Bool[Array, "batch capacity"]
    segments: Int[Array, "batch capacity"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Slots per row: the longest sequence that fits."""
        return self.is_token.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer of a `KVCache`: `keys` and `values` of all layers, this one's index and the next slot."""

    keys: Vectors
    values: Vectors
    layer: Int[Array, ""]
    start: Int[Array, ""]

    def update(
        self,
        key: Float[Array, "batch seq kv_heads dim"],
        value: Float[Array, "batch seq kv_heads dim"],
    ) -> tuple[
        "LayerCache",
        Float[Array, "batch capacity kv_heads dim"],
        Float[Array, "batch capacity kv_heads dim"],
    ]:
        """Write this call's keys and values; return the cache and all of the layer's keys and values."""
        zero = jnp.zeros((), jnp.int32)
        start = (self.layer, zero, self.start, zero, zero)

        def stacked(new: Array) -> Array:
            return new[None]

        def of_layer(cached: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(cached, self.layer, axis=0, keepdims=False)

        keys, layer_keys = _write(self.keys, key, start, stacked, of_layer)
        values, layer_values = _write(self.values, value, start, stacked, of_layer)
        return replace(self, keys=keys, values=values), layer_keys, layer_values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class UnstackedLayerCache:
    """`LayerCache` for arrays of one layer, [batch * kv_heads, capacity, dim] (`unstack_cache`)."""

    keys: Vectors
    values: Vectors
    start: Int[Array, ""]

    def update(
        self,
        key: Float[Array, "batch seq kv_heads dim"],
        value: Float[Array, "batch seq kv_heads dim"],
    ) -> tuple[
        "UnstackedLayerCache",
        Float[Array, "batch capacity kv_heads dim"],
        Float[Array, "batch capacity kv_heads dim"],
    ]:
        """As `LayerCache.update`."""
        batch, _, heads, _ = key.shape
        zero = jnp.zeros((), jnp.int32)
        start = (zero, self.start, zero)

        def tokens_first(cached: Array) -> Array:
            return jnp.moveaxis(cached.reshape(batch, heads, *cached.shape[1:]), 1, 2)

        keys, layer_keys = _write(self.keys, key, start, _heads_first, tokens_first)
        values, layer_values = _write(self.values, value, start, _heads_first, tokens_first)
        return replace(self, keys=keys, values=values), layer_keys, layer_values


def init_cache(config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens.

    It takes 2 * layers * batch * capacity * kv_heads * head_dim elements of `dtype`; for int8, plus one
    float32 scale per head_dim elements.

    Examples:
        >>> import jax.numpy as jnp
        >>> from llama_jax import PRESETS, init_cache
        >>> cache = init_cache(PRESETS["tiny-4m"], batch=1, capacity=32, dtype=jnp.bfloat16)
        >>> cache.keys.shape
        (4, 1, 32, 2, 64)
    """
    shape = (config.num_hidden_layers, batch, capacity, config.kv_heads, config.head_size)
    axes = ("layers", "batch", "hidden", "kv_heads", "hidden")

    def empty() -> Vectors:
        zeros = constrain(jnp.zeros(shape, dtype), *axes)
        if jnp.dtype(dtype) != jnp.int8:
            return zeros
        return Int8Vectors(zeros, constrain(jnp.zeros(shape[:-1], jnp.float32), *axes[:-1]))

    return KVCache(
        keys=empty(),
        values=empty(),
        is_token=jnp.zeros((batch, capacity), bool),
        segments=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def unstack_cache(cache: KVCache) -> KVCache:
    """The cache with one [batch * kv_heads, capacity, dim] per layer, for unstacked layers.

    A loop then updates each of them in place, and their matmuls need no transpose.
    """

    def unstack(stacked: Vectors | tuple[Vectors, ...]) -> tuple[Vectors, ...]:
        assert not isinstance(stacked, tuple)
        count = stacked.shape[0]
        return tuple(
            jax.tree.map(lambda array, i=i: _heads_first(array[i]), stacked) for i in range(count)
        )

    return replace(cache, keys=unstack(cache.keys), values=unstack(cache.values))


def stack_cache(cache: KVCache) -> KVCache:
    """The cache that `unstack_cache` was called with."""
    batch = cache.is_token.shape[0]

    def layer_of(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(batch, -1, *array.shape[1:]), 1, 2)

    def stack(layers: Vectors | tuple[Vectors, ...]) -> Vectors:
        assert isinstance(layers, tuple)
        return jax.tree.map(lambda *arrays: jnp.stack([*map(layer_of, arrays)]), *layers)

    return replace(cache, keys=stack(cache.keys), values=stack(cache.values))


def grow_cache(cache: KVCache, capacity: int) -> KVCache:
    """The cache, stacked or not, with more slots."""
    more = capacity - cache.capacity
    assert more >= 0, "a cache only grows"

    def pad(array: Array, axis: int) -> Array:
        return jnp.pad(array, [(0, more * (index == axis)) for index in range(array.ndim)])

    def pad_vectors(vectors: Vectors | tuple[Vectors, ...]) -> Vectors | tuple[Vectors, ...]:
        axis = 1 if isinstance(vectors, tuple) else 2
        return jax.tree.map(lambda array: pad(array, axis), vectors)

    return replace(
        cache,
        keys=pad_vectors(cache.keys),
        values=pad_vectors(cache.values),
        is_token=pad(cache.is_token, 1),
        segments=pad(cache.segments, 1),
    )


def _heads_first(layer: Array) -> Array:
    """[batch, seq, kv_heads, ...] to [batch * kv_heads, seq, ...]."""
    batch, seq, heads, *vector = layer.shape
    return jnp.moveaxis(layer, 2, 1).reshape(batch * heads, seq, *vector)


def reserve(
    cache: KVCache,
    is_token: Bool[Array, "batch seq"],
    segments: Int[Array, "batch seq"],
) -> KVCache:
    """The cache with the next `seq` slots in use; each layer writes its keys and values into them."""
    start = (jnp.zeros((), jnp.int32), cache.length)
    return replace(
        cache,
        is_token=jax.lax.dynamic_update_slice(cache.is_token, is_token, start),
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, start),
        length=cache.length + is_token.shape[1],
    )


def last_segment(cache: KVCache) -> Int[Array, "batch 1"]:
    """The segment of each row's newest slot, 0 in an empty cache."""
    newest = jnp.maximum(cache.length - 1, 0)
    return jax.lax.dynamic_index_in_dim(cache.segments, newest, axis=1)


def _write(
    cached: Vectors,
    new: Float[Array, "batch seq kv_heads dim"],
    start: tuple[Array, ...],
    to_cache: Callable[[Array], Array],
    from_cache: Callable[[Array], Array],
) -> tuple[Vectors, Float[Array, "batch capacity kv_heads dim"]]:
    """Write `new` at `start`; returns all that is cached, and this layer's vectors out of it.

    Args:
        to_cache, from_cache: between the layout of a layer, [batch, seq, kv_heads, ...], and the cache's.
    """
    entries: Vectors
    entries = quantize_vectors(new) if isinstance(cached, Int8Vectors) else new.astype(cached.dtype)

    def write(old: Array, entry: Array) -> Array:
        return jax.lax.dynamic_update_slice(old, to_cache(entry), start[: old.ndim])

    cached = jax.tree.map(write, cached, entries)
    layer = jax.tree.map(from_cache, cached)
    return cached, dequantize_vectors(layer) if isinstance(layer, Int8Vectors) else layer


def quantize_vectors(x: Float[Array, "*slots dim"]) -> Int8Vectors:
    """Symmetric 8 bits, the largest element of each vector at 127."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127
    values = jnp.round(wide / jnp.where(scales == 0, 1, scales)[..., None])
    return Int8Vectors(values.astype(jnp.int8), scales)


def dequantize_vectors(vectors: Int8Vectors) -> Float[Array, "*slots dim"]:
    """The vectors in float32."""
    return vectors.values.astype(jnp.float32) * vectors.scales[..., None]
