"""LlamaModel: embed, scan over the stacked layers, final norm."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.attention.cache import KVCache, extend_cache, last_segment
from llama_jax.attention.dispatch import Implementation
from llama_jax.attention.masks import AttentionMask
from llama_jax.config import LlamaConfig
from llama_jax.inputs.ids import require_ids
from llama_jax.inputs.keys import as_key
from llama_jax.inputs.positions import as_array, known_value
from llama_jax.models.layers import DecoderLayer, RMSNorm, parameter
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.numerics.remat import Remat, rematerialised
from llama_jax.numerics.rope import rope_cos_sin
from llama_jax.numerics.scalars import is_integer, plain_number
from llama_jax.sharding import RESIDUAL_AXES, constrain

# what a caller may pass: JAX or numpy arrays
Tokens = Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"]
Positions = Int[Array, "_ seq"] | Int[np.ndarray, "_ seq"]
Embeddings = Float[Array, "batch seq hidden"] | Float[np.ndarray, "batch seq hidden"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelOutput:
    """What `LlamaModel` returns; fields not asked for are None.

    hidden_states: layers + 1 arrays: the embeddings, the output of every layer but the last, and
    `last_hidden_state` (the last layer's output after the final norm), as transformers returns them.
    """

    last_hidden_state: Float[Array, "batch seq hidden"]
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class Embedding(nnx.Module):
    """The token embedding table [vocab, hidden]."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # torch's `padding_idx`, which transformers sets: that row gets no gradient as an input. Negative
        # ids count from the end there; ids beyond the vocabulary, which torch refuses, mean none here.
        pad, vocab = config.pad_token_id, config.vocab_size
        self.padding_id = pad % vocab if pad is not None and -vocab <= pad < vocab else None
        shape = (config.vocab_size, config.hidden_size)
        normal = nnx.initializers.normal(config.initializer_range)
        self.weight = parameter(rngs, shape, ("vocab", "embed"), normal, dtype)

    def __call__(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        """Rows of the table; NaN for an id outside the vocabulary, never another token's row."""

        def take(table: Array) -> Array:
            # fills with NaN; the integers of a quantised table with some code, its scales with NaN
            return table.at[input_ids].get(mode="fill", wrap_negative_indices=False)

        rows = jax.tree.map(take, self.weight)[...]
        if self.padding_id is None:
            return rows
        padding = (input_ids == self.padding_id)[..., None]
        return jnp.where(padding, jax.lax.stop_gradient(rows), rows)


class LlamaModel(PretrainedModel):
    """The decoder without a head. Layers are stacked on a leading axis and run with one scan."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        stack = (config.num_hidden_layers,)
        # or a list of single layers, where decoding unstacks them
        self.layers: DecoderLayer | nnx.List = DecoderLayer(
            config, stack=stack, dtype=dtype, rngs=rngs
        )
        eps = config.rms_norm_eps
        self.norm = RMSNorm(config.hidden_size, eps, stack=(), dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights, which is the dtype of the computation."""
        return self.embed_tokens.weight.dtype

    def __call__(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Array | np.ndarray | None = None,
        position_ids: Positions | None = None,
        inputs_embeds: Embeddings | None = None,
        segment_ids: Tokens | None = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        dropout_key: Key[Array, ""] | None = None,
        *,
        attention_implementation: Implementation | None = None,
        remat: Remat = "dots",
        scan_unroll: int = 1,
    ) -> ModelOutput:
        """Run the decoder.

        Args:
            input_ids: token ids; exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding, on either side or between.
                With a cache it speaks of this call's tokens; the cache remembers earlier ones.
            inputs_embeds: given instead of ids, cast to the model's dtype.
            position_ids: rotary positions, [batch, seq] or [1, seq]; default: counted from 0, or from
                the cache's length. They never change who attends to whom: positions that start anew
                do not pack (transformers infers packing from them when it runs without a cache).
            segment_ids: packed documents; tokens attend only within their own segment. With a cache and
                without segment_ids, a row goes on in its last segment.
            cache: earlier keys and values; the returned cache holds this call's as well. Too little room
                for `seq` more tokens is an error outside jit and NaN under it.
            dropout_key: turns attention dropout on (training).
            attention_implementation: see `attention`; None is the fastest.
            remat: what the backward pass keeps of a layer and what it computes again, see `remat.py`.
            scan_unroll: how many layers one turn of the loop over them holds; more compile longer and
                can run faster.

        Raises:
            ValueError: shapes that do not fit, ids outside the vocabulary or a full cache (the latter
                two only where the values are known, outside jit).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        given = as_array(input_ids if inputs_embeds is None else inputs_embeds)
        if inputs_embeds is None:
            require_ids("input_ids", given, self.config.vocab_size)
        elif given.ndim != 3 or given.shape[2] != self.config.hidden_size or 0 in given.shape:
            raise ValueError(
                f"inputs_embeds: found shape {given.shape}, expected [batch, seq, "
                f"{self.config.hidden_size}] of at least one"
            )
        batch, seq = given.shape[:2]
        attention_mask, segment_ids, position_ids = map(
            as_array, (attention_mask, segment_ids, position_ids)
        )
        for name, value in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
            if value is not None and value.shape != (batch, seq):
                raise ValueError(f"{name}: found shape {value.shape}, expected {(batch, seq)}")
        if position_ids is not None and position_ids.shape not in ((1, seq), (batch, seq)):
            raise ValueError(
                f"position_ids: found shape {position_ids.shape}, expected {(batch, seq)}"
            )
        scan_unroll = plain_number(scan_unroll)
        if not is_integer(scan_unroll) or scan_unroll < 1:
            raise ValueError(f"scan_unroll: found {scan_unroll!r}, expected a positive integer")
        if cache is not None:
            _require_room(cache, self.config, batch, seq)
        return _decode(
            self,
            jnp.asarray(given) if inputs_embeds is None else jnp.asarray(given, self.dtype),
            None if attention_mask is None else jnp.asarray(attention_mask, bool),
            None if position_ids is None else jnp.asarray(position_ids),
            None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
            cache,
            as_key("dropout_key", dropout_key),
            output_hidden_states=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
            attention_implementation=attention_implementation,
            remat=remat,
            scan_unroll=scan_unroll,
        )


# Compiled as a whole, so that a call outside jit costs one dispatch and compiles once per shape; within
# a caller's jit it is inlined.
@partial(
    jax.jit,
    static_argnames=(
        "output_hidden_states",
        "output_attentions",
        "attention_implementation",
        "remat",
        "scan_unroll",
    ),
)
def _decode(
    model: LlamaModel,
    given: Array,
    is_token: Bool[Array, "batch seq"] | None,
    position_ids: Int[Array, "_ seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    cache: KVCache | None,
    dropout_key: Key[Array, ""] | None,
    *,
    output_hidden_states: bool,
    output_attentions: bool,
    attention_implementation: Implementation | None,
    remat: Remat,
    scan_unroll: int,
) -> ModelOutput:
    """The forward pass on checked arguments; `given` are ids [batch, seq] or embeddings."""
    config = model.config
    x = model.embed_tokens(given) if given.ndim == 2 else given
    x = constrain(x, *RESIDUAL_AXES)
    batch, seq = x.shape[:2]
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length
    slots = start + jnp.arange(seq, dtype=jnp.int32)
    if position_ids is None:
        position_ids = slots[None]
    cos, sin = rope_cos_sin(
        jnp.broadcast_to(position_ids, (batch, seq)),
        config.rope,
        config.head_size,
        config.max_position_embeddings,
        x.dtype,
    )
    mask, cache = mask_of_call(batch, seq, is_token, segment_ids, cache)
    layer_count = config.num_hidden_layers
    dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, layer_count)

    def run_layer(carry, layer_inputs):
        x, store = carry
        layer, index, key = layer_inputs
        y, weights, store = layer(
            x,
            cos,
            sin,
            mask,
            store,
            index,
            start,
            key,
            attention_implementation,
            output_attentions,
        )
        return (y, store), (x if output_hidden_states else None, weights)

    indices = jnp.arange(layer_count, dtype=jnp.int32)
    if isinstance(model.layers, DecoderLayer):
        store = None if cache is None else (cache.keys, cache.values)
        (x, store), (inputs, weights) = jax.lax.scan(
            rematerialised(run_layer, remat, in_loop=scan_unroll < layer_count),
            (x, store),
            (model.layers, indices, dropout_keys),
            unroll=scan_unroll,
        )
    else:
        assert cache is not None, "unstacked layers are for decoding"
        outcomes: list[Any] = []
        stores: list[Any] = []
        for layer, *of_layer in zip(model.layers, cache.keys, cache.values, strict=True):
            (x, of_layer), outcome = run_layer((x, tuple(of_layer)), (layer, None, None))
            outcomes.append(outcome)
            stores.append(of_layer)
        inputs, weights = zip(*outcomes, strict=True)
        store = tuple(k for k, _ in stores), tuple(v for _, v in stores)
    if cache is not None and store is not None:
        cache = replace(cache, keys=store[0], values=store[1])
        # beyond the capacity, the update above has gone to other tokens' slots
        x = jnp.where(cache.length <= cache.capacity, x, jnp.nan)
    x = model.norm(x)
    return ModelOutput(
        last_hidden_state=x,
        cache=cache,
        hidden_states=(*inputs, x) if output_hidden_states else None,
        attentions=tuple(weights) if output_attentions else None,
    )


def mask_of_call(
    batch: int,
    seq: int,
    is_token: Bool[Array, "batch seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    cache: KVCache | None,
) -> tuple[AttentionMask, KVCache | None]:
    """Who sees whom in a call of `seq` tokens a row, and the cache with their slots taken.

    The keys are this call's tokens or, with a cache, its slots.
    """
    if cache is None:
        return AttentionMask(None, None, is_token, segment_ids, segment_ids), None
    queries = cache.length + jnp.arange(seq, dtype=jnp.int32)
    if segment_ids is None:
        segment_ids = jnp.broadcast_to(last_segment(cache), (batch, seq))
    is_token = jnp.ones((batch, seq), bool) if is_token is None else is_token
    cache = extend_cache(cache, is_token, segment_ids)
    keys = jnp.arange(cache.capacity, dtype=jnp.int32)
    return AttentionMask(queries, keys, cache.is_token, segment_ids, cache.segments), cache


def _require_room(cache: KVCache, config: LlamaConfig, batch: int, seq: int) -> None:
    expected = (config.num_hidden_layers, batch, cache.capacity, config.kv_heads, config.head_size)
    stacked = not isinstance(cache.keys, tuple)
    if stacked and (cache.keys.shape != expected or cache.values.shape != expected):
        raise ValueError(f"cache: found keys {cache.keys.shape}, expected {expected}")
    if seq > cache.capacity:
        raise ValueError(f"cache: {cache.capacity} slots, expected room for {seq} tokens")
    length = known_value(cache.length)
    if length is not None and int(length) + seq > cache.capacity:
        raise ValueError(
            f"cache: {length} of {cache.capacity} slots are taken, expected room for "
            f"{seq} more tokens"
        )
