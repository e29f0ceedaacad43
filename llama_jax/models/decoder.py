"""LlamaModel: the embedding, a scan over the stacked layers, the final norm."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from llama_jax.attention.cache import (
    KVCache,
    LayerCache,
    UnstackedLayerCache,
    last_segment,
    reserve,
)
from llama_jax.attention.implementation import Implementation
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.zigzag import ZigZag
from llama_jax.config import LlamaConfig
from llama_jax.inputs.ids import require_ids
from llama_jax.inputs.keys import as_key
from llama_jax.inputs.positions import as_array, known_value
from llama_jax.models.layers import (
    DecoderLayer,
    LayerCall,
    LayerOutput,
    RMSNorm,
    parameter,
    rms_norm,
)
from llama_jax.models.pipeline import Pipeline, run_pipeline
from llama_jax.models.pretrained import PretrainedModel
from llama_jax.numerics.remat import checkpointed
from llama_jax.numerics.remat_policy import Kept, Remat
from llama_jax.numerics.rope import rope_cos_sin
from llama_jax.numerics.scalars import is_integer, plain_number
from llama_jax.sharding import RESIDUAL_AXES, TENSOR_AXIS, constrain, mesh_axes

# what a caller may pass: JAX or numpy arrays
Tokens = Int[Array, "batch seq"] | Int[np.ndarray, "batch seq"]
Positions = Int[Array, "_ seq"] | Int[np.ndarray, "_ seq"]
Embeddings = Float[Array, "batch seq hidden"] | Float[np.ndarray, "batch seq hidden"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelOutput:
    """What `LlamaModel` returns. Optional fields are None unless requested.

    Attributes:
        hidden_states: layers + 1 arrays, as transformers returns them: the embeddings, the output of every
            layer but the last, and `last_hidden_state`, which is after the final norm.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaModel(config, rngs=nnx.Rngs(0))
        >>> out = model(jnp.array([[5, 6, 7]]), output_hidden_states=True)
        >>> len(out.hidden_states), out.attentions
        (3, None)
    """

    last_hidden_state: Float[Array, "batch seq hidden"]
    cache: KVCache | None = None
    hidden_states: tuple[Float[Array, "batch seq hidden"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads seq k"], ...] | None = None


class Embedding(nnx.Module):
    """The token embedding table [vocab, hidden]."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # transformers sets torch's `padding_idx`: that row gets no gradient as an input. A negative id
        # counts from the end; one outside the vocabulary, which torch refuses, means none here.
        pad, vocab = config.pad_token_id, config.vocab_size
        self.padding_id = pad % vocab if pad is not None and -vocab <= pad < vocab else None
        shape = (config.vocab_size, config.hidden_size)
        normal = nnx.initializers.normal(config.initializer_range)
        self.weight = parameter(rngs, shape, ("vocab", "embed"), normal, dtype)

    def __call__(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        """Rows of the table; NaN for an id outside the vocabulary, never another token's row."""

        axes = mesh_axes()
        # in a `shard_map` over other axes, XLA's partitioner (jax 0.10.2) crashes on a table that tensor is
        # not the only one to split
        gather = axes.in_shard_map and axes.present(TENSOR_AXIS)

        def take(table: Array) -> Array:
            if gather:
                table = constrain(table, "vocab", "hidden")
            # fills with NaN; of a quantized table, the codes with some integer and the scales with NaN
            return table.at[input_ids].get(mode="fill", wrap_negative_indices=False)

        rows = jax.tree.map(take, self.weight)[...]
        if self.padding_id is None:
            return rows
        padding = (input_ids == self.padding_id)[..., None]
        return jnp.where(padding, jax.lax.stop_gradient(rows), rows)


class DecoderOptions(TypedDict, total=False):
    """Keyword arguments of `LlamaModel.__call__` that models with a head pass on to it."""

    cache: KVCache | None
    output_hidden_states: bool
    output_attentions: bool
    dropout_key: Key[Array, ""] | None
    attention_implementation: Implementation | None
    remat: Remat | Kept
    scan_unroll: int
    reduce_dtype: DTypeLike | None
    pipeline: Pipeline | None


class LlamaModel(PretrainedModel):
    """The decoder without a head. Layers are stacked on a leading axis and run with one scan.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2,
        ... )
        >>> model = LlamaModel(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[5, 6, 7]])).last_hidden_state.shape
        (1, 3, 8)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        stack = (config.num_hidden_layers,)
        # a list of single layers where decoding unstacks them (`generation.unstacked`)
        self.layers: DecoderLayer | nnx.List[DecoderLayer] = DecoderLayer(
            config, stack=stack, dtype=dtype, rngs=rngs
        )
        eps = config.rms_norm_eps
        self.norm = RMSNorm(config.hidden_size, eps, stack=(), dtype=dtype, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights and of the computation."""
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
        remat: Remat | Kept = "dots",
        scan_unroll: int = 1,
        token_order: ZigZag | None = None,
        visible_until: Tokens | None = None,
        reduce_dtype: DTypeLike | None = None,
        pipeline: Pipeline | None = None,
    ) -> ModelOutput:
        """Run the decoder.

        Args:
            input_ids: token ids; pass either these or `inputs_embeds`.
            attention_mask: [batch, seq], 1 for tokens and 0 for padding, which may be on either side or in
                between. With a cache it covers this call's tokens; the cache remembers earlier ones.
            position_ids: rotary positions, [batch, seq] or [1, seq]; default: counted from 0, or from the
                cache's length. They never change who attends to whom: positions that restart do not pack
                documents (transformers infers packing from them when it runs without a cache).
            inputs_embeds: embeddings in place of ids, cast to the model's dtype.
            segment_ids: packed documents; tokens attend only within their segment. Without them, a call
                with a cache continues each row's last segment.
            cache: earlier keys and values; the returned cache has this call's as well. If `seq` more tokens
                do not fit, the result is an error outside jit and NaN under it.
            output_hidden_states: return the hidden states of every layer.
            output_attentions: return the attention weights; needs the "plain" implementation.
            dropout_key: turns attention dropout on (training).
            attention_implementation: "plain" holds all scores, "blocked" never does, "cudnn" and "triton"
                are for NVIDIA GPUs and "splash" for TPUs; None picks the fastest one for the platform.
            remat: what the backward pass recomputes: "none", "dots" (all but the outputs of matmuls),
                "full" (every layer from its input), or all but what a
                `llama_jax.numerics.remat_policy.Kept` names.
            scan_unroll: layers per iteration of the scan; more compile longer and can run faster.
            pipeline: run the layers over the axis "stage" of the ambient mesh; None for a scan over them,
                for which XLA moves weights of other stages.
            token_order: the order in which all arrays given and returned have the tokens of a row; None for
                the row's own. Over a mesh's sequence axis, `ZigZag` balances the work of the shards.
            visible_until: [batch, seq], the last index in the row that attends to each token; default: all
                later ones do. It lets sequences that begin alike share a row, each with its own end
                (`llama_jax.evaluation.packing`); they need `position_ids` as well.
            reduce_dtype: of a model in bfloat16: the dtype in which the parts of the weights' gradients are
                added up that the devices of a mesh compute, each in float32. None is float32; bfloat16
                halves what they send.

        Raises:
            ValueError: shapes that do not match, two of `cache`, `token_order` and `visible_until`, ids
                outside the vocabulary or a full cache (these two only outside jit, where values are known).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        tokens = as_array(input_ids if inputs_embeds is None else inputs_embeds)
        if inputs_embeds is None:
            require_ids("input_ids", tokens, self.config.vocab_size)
        elif tokens.ndim != 3 or tokens.shape[2] != self.config.hidden_size or 0 in tokens.shape:
            raise ValueError(
                f"inputs_embeds: found shape {tokens.shape}, expected [batch, seq, "
                f"{self.config.hidden_size}] of at least one"
            )
        batch, seq = tokens.shape[:2]
        attention_mask, segment_ids, position_ids, visible_until = map(
            as_array, (attention_mask, segment_ids, position_ids, visible_until)
        )
        for name, value in (
            ("attention_mask", attention_mask),
            ("segment_ids", segment_ids),
            ("visible_until", visible_until),
        ):
            if value is not None and value.shape != (batch, seq):
                raise ValueError(f"{name}: found shape {value.shape}, expected {(batch, seq)}")
        if position_ids is not None and position_ids.shape not in ((1, seq), (batch, seq)):
            raise ValueError(
                f"position_ids: found shape {position_ids.shape}, expected {(batch, seq)}"
            )
        scan_unroll = plain_number(scan_unroll)
        if not is_integer(scan_unroll) or scan_unroll < 1:
            raise ValueError(f"scan_unroll: found {scan_unroll!r}, expected a positive integer")
        if token_order is not None:
            token_order.require_length(seq)
            if cache is not None:
                raise ValueError("pass at most one of cache and token_order")
        if visible_until is not None and (cache is not None or token_order is not None):
            raise ValueError("pass at most one of visible_until, cache and token_order")
        if pipeline is not None and (
            cache is not None or output_hidden_states or output_attentions
        ):
            raise ValueError(
                "pipeline: found it with cache, output_hidden_states or output_attentions, of which it has "
                "none: call without a pipeline for them"
            )
        is_new = False
        if cache is not None:
            _require_room(cache, self.config, batch, seq)
            length = known_value(cache.length)
            # weights are of all slots; of one query there is nothing to skip
            is_new = length is not None and not length and seq > 1 and not output_attentions
        inputs = _Inputs(
            jnp.asarray(tokens) if inputs_embeds is None else jnp.asarray(tokens, self.dtype),
            None if attention_mask is None else jnp.asarray(attention_mask, bool),
            None if position_ids is None else jnp.asarray(position_ids),
            None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32),
            None if visible_until is None else jnp.asarray(visible_until, jnp.int32),
        )
        options = _Options(
            bool(output_hidden_states),
            bool(output_attentions),
            attention_implementation,
            remat,
            scan_unroll,
            token_order,
            None if reduce_dtype is None else jnp.dtype(reduce_dtype),
            pipeline,
            is_new,
        )
        return _forward(self, inputs, cache, as_key("dropout_key", dropout_key), options)


class _Inputs(NamedTuple):
    """Checked arrays of one call."""

    tokens: Array  # ids [batch, seq] or embeddings [batch, seq, hidden]
    is_token: Bool[Array, "batch seq"] | None
    position_ids: Int[Array, "_ seq"] | None
    segment_ids: Int[Array, "batch seq"] | None
    visible_until: Int[Array, "batch seq"] | None


class _Options(NamedTuple):
    """What a compiled forward pass is specialized on."""

    output_hidden_states: bool
    output_attentions: bool
    attention_implementation: Implementation | None
    remat: Remat | Kept
    scan_unroll: int
    token_order: ZigZag | None
    reduce_dtype: DTypeLike | None
    pipeline: Pipeline | None
    cache_is_new: bool


# Jitted as a whole, so that a call outside jit is one dispatch and compiles once per shape; within a
# caller's jit it is inlined.
@partial(jax.jit, static_argnames="options")
def _forward(
    model: LlamaModel,
    inputs: _Inputs,
    cache: KVCache | None,
    dropout_key: Key[Array, ""] | None,
    options: _Options,
) -> ModelOutput:
    config = model.config
    is_ids = inputs.tokens.ndim == 2
    x = constrain(model.embed_tokens(inputs.tokens) if is_ids else inputs.tokens, *RESIDUAL_AXES)
    batch, seq = x.shape[:2]
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length
    position_ids = inputs.position_ids
    if position_ids is None:
        order = options.token_order
        slots = jnp.arange(seq, dtype=jnp.int32) if order is None else order.slots(seq)
        position_ids = (start + slots)[None]
    cos, sin = rope_cos_sin(
        jnp.broadcast_to(position_ids, (batch, seq)),
        config.rope,
        config.head_size,
        config.max_position_embeddings,
        x.dtype,
    )
    mask, cache = mask_and_cache(
        batch, seq, inputs.is_token, inputs.segment_ids, cache, is_new=options.cache_is_new
    )
    mask = mask._replace(order=options.token_order, visible_until=inputs.visible_until)
    call = LayerCall(
        cos,
        sin,
        mask,
        options.attention_implementation,
        options.output_attentions,
        options.reduce_dtype,
    )
    if isinstance(model.layers, DecoderLayer):
        ran = _scan_layers(
            model.layers,
            x,
            call,
            cache,
            count=config.num_hidden_layers,
            start=start,
            dropout_key=dropout_key,
            options=options,
        )
    else:
        assert cache is not None, "unstacked layers are for decoding"
        ran = _decode_layers(model.layers, x, call, cache, start=start)
    x, cache = ran.x, ran.cache
    if cache is not None:
        # beyond the capacity, `update` has overwritten other tokens' slots
        x = jnp.where(cache.length <= cache.capacity, x, jnp.nan)
    # In the backward pass the gradients of both exist before the layers' begin. XLA would put off the
    # weight's, which is tiny, and keep two arrays of the size of x for it.
    x, norm_weight = jax.lax.optimization_barrier((x, model.norm.weight[...]))
    x = rms_norm(x, norm_weight, model.norm.eps)
    return ModelOutput(
        last_hidden_state=x,
        cache=cache,
        hidden_states=(*ran.inputs, x) if options.output_hidden_states else None,
        attentions=tuple(ran.attentions) if options.output_attentions else None,
    )


class _RanLayers(NamedTuple):
    """The output of all layers; the input and the attention weights of each, if requested."""

    x: Array
    cache: KVCache | None
    inputs: Any
    attentions: Any


def _scan_layers(
    layers: DecoderLayer,
    x: Float[Array, "batch seq hidden"],
    call: LayerCall,
    cache: KVCache | None,
    *,
    count: int,
    start: Int[Array, ""],
    dropout_key: Key[Array, ""] | None,
    options: _Options,
) -> _RanLayers:
    """Run `count` stacked layers; `start` is the cache slot of the first token."""

    def run_layer(carry: Any, layer_inputs: Any) -> Any:
        x, stored = carry
        # lowers the peak on a TPU, by 0.5 GiB for 8B (docs/log.md)
        x = jax.lax.optimization_barrier(x)
        layer, index, key = layer_inputs
        layer_cache = None
        if stored is not None:
            keys, values = stored
            layer_cache = LayerCache(keys, values, index, start)
        out = layer(x, call, layer_cache, key)
        stored = None if out.cache is None else (out.cache.keys, out.cache.values)
        layer_input = x if options.output_hidden_states else None
        return (out.hidden, stored), (layer_input, out.attention_weights)

    dropout_keys = None if dropout_key is None else jax.random.split(dropout_key, count)
    if options.pipeline is not None:
        x = run_pipeline(
            options.pipeline,
            layers,
            x,
            call,
            dropout_keys,
            remat=options.remat,
            scan_unroll=options.scan_unroll,
        )
        return _RanLayers(x, None, None, None)
    stored: Any = None if cache is None else (cache.keys, cache.values)
    (x, stored), (inputs, weights) = jax.lax.scan(
        checkpointed(run_layer, options.remat, in_scan=options.scan_unroll < count),
        (x, stored),
        (layers, jnp.arange(count, dtype=jnp.int32), dropout_keys),
        unroll=options.scan_unroll,
    )
    if cache is not None:
        cache = replace(cache, keys=stored[0], values=stored[1])
    return _RanLayers(x, cache, inputs, weights)


def _decode_layers(
    layers: Iterable[DecoderLayer],
    x: Float[Array, "batch seq hidden"],
    call: LayerCall,
    cache: KVCache,
    *,
    start: Int[Array, ""],
) -> _RanLayers:
    """Run unstacked layers with a cache of `unstack_cache`."""
    assert isinstance(cache.keys, tuple)
    assert isinstance(cache.values, tuple)
    inputs, weights, caches = [], [], []
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        inputs.append(x)
        layer_cache = UnstackedLayerCache(keys, values, start)
        x, layer_cache, layer_weights = _decode_layer(layer, x, call, layer_cache)
        assert layer_cache is not None
        caches.append(layer_cache)
        weights.append(layer_weights)
    all_keys = tuple(layer_cache.keys for layer_cache in caches)
    all_values = tuple(layer_cache.values for layer_cache in caches)
    return _RanLayers(x, replace(cache, keys=all_keys, values=all_values), inputs, weights)


# Traced and lowered once for all layers, which takes a third of the time of starting; XLA inlines it.
@jax.jit
def _decode_layer(
    layer: DecoderLayer,
    x: Float[Array, "batch seq hidden"],
    call: LayerCall,
    cache: UnstackedLayerCache,
) -> LayerOutput:
    return layer(x, call, cache)


def mask_and_cache(
    batch: int,
    seq: int,
    is_token: Bool[Array, "batch seq"] | None,
    segment_ids: Int[Array, "batch seq"] | None,
    cache: KVCache | None,
    *,
    is_new: bool = False,
) -> tuple[AttentionMask, KVCache | None]:
    """The mask of a call with `seq` tokens per row, and the cache with slots reserved for them.

    The keys are this call's tokens or, with a cache, its slots. With a new one they are the tokens, too, so
    that it is known at trace time what lies beyond a block.
    """
    own = AttentionMask(None, None, is_token, segment_ids, segment_ids)
    if cache is None:
        return own, None
    queries = cache.length + jnp.arange(seq, dtype=jnp.int32)
    if segment_ids is None:
        segment_ids = jnp.broadcast_to(last_segment(cache), (batch, seq))
    is_token = jnp.ones((batch, seq), bool) if is_token is None else is_token
    cache = reserve(cache, is_token, segment_ids)
    if is_new:
        return own, cache
    keys = jnp.arange(cache.capacity, dtype=jnp.int32)
    return AttentionMask(queries, keys, cache.is_token, segment_ids, cache.segments), cache


def _require_room(cache: KVCache, config: LlamaConfig, batch: int, seq: int) -> None:
    expected = (config.num_hidden_layers, batch, cache.capacity, config.kv_heads, config.head_size)
    for name, stored in (("keys", cache.keys), ("values", cache.values)):
        if not isinstance(stored, tuple) and stored.shape != expected:
            raise ValueError(f"cache: found {name} {stored.shape}, expected {expected}")
    if seq > cache.capacity:
        raise ValueError(f"cache: {cache.capacity} slots are too few for {seq} tokens")
    length = known_value(cache.length)
    if length is not None and int(length) + seq > cache.capacity:
        raise ValueError(
            f"cache: {length} of {cache.capacity} slots are in use; no room for {seq} more tokens"
        )
