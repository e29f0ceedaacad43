"""Grouped-query attention: picks an implementation and runs it on every shard of a mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from llama_jax.attention.blocked import blocked_attention
from llama_jax.attention.cudnn import cudnn_attention, why_not_cudnn
from llama_jax.attention.implementation import Implementation
from llama_jax.attention.masks import AttentionMask, dense_mask, slots_of
from llama_jax.attention.one_query import one_query_attention
from llama_jax.attention.plain import dot_product_attention
from llama_jax.numerics.backend import target_platform
from llama_jax.sharding import BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS, MeshAxes, mesh_axes

# Up to this many tokens the scores are small, and it is faster to hold them.
PLAIN_LENGTH = 128


# Pallas, in which the kernels of "triton" and "splash" are written, takes long to import, and a CPU needs
# neither.


def _triton_attention(*operands: Any, **choices: Any) -> Array:
    from llama_jax.attention.triton import triton_attention

    return triton_attention(*operands, **choices)


def _why_not_triton(query: Any, mask: AttentionMask, sequence_shards: int) -> str | None:
    from llama_jax.attention.triton import why_not_triton

    return why_not_triton(query, mask, sequence_shards)


def _why_not_splash(query: Any, mask: AttentionMask, sequence_shards: int) -> str | None:
    from llama_jax.attention.splash import why_not_splash

    return why_not_splash(query, mask, sequence_shards)


# implementations that run on (query, key, value, mask); plain and splash need other arguments
_RUN: dict[str, Callable[..., Array]] = {
    "blocked": blocked_attention,
    "cudnn": cudnn_attention,
    "triton": _triton_attention,
}
# for those with restrictions: why one cannot do a call, or None
_WhyNot = Callable[[Array, AttentionMask, int], str | None]
_WHY_NOT: dict[str, _WhyNot] = {
    "cudnn": why_not_cudnn,
    "splash": _why_not_splash,
    "triton": _why_not_triton,
}
# the kernels of a platform, the fastest first
_KERNELS: dict[str, tuple[str, ...]] = {"gpu": ("cudnn", "triton"), "tpu": ("splash",)}


def attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    *,
    implementation: str | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, "*rows"] | None = None,
    output_weights: bool = False,
) -> tuple[Float[Array, "batch q heads dim"], Float[Array, "batch heads q k"] | None]:
    """softmax(query key^T / sqrt(dim)) value, head h attending to kv head h // (heads / kv_heads).

    A query that sees no key yields zeros. Under an ambient mesh the batch is split over data and fsdp, the
    heads over tensor and the queries over sequence, where they divide; every shard gathers all keys.

    Args:
        mask: who attends to whom, and the order of the tokens: of contiguous parts of a sequence the last
            sees most keys, in the order of `ZigZag` all see equally many.
        implementation: "plain" holds the scores, and is the only one with weights and dropout; "blocked"
            never holds the scores of the full sequence; "cudnn" and "triton" are kernels for NVIDIA GPUs,
            of which "triton" alone does documents and caches, "splash" is one for TPUs. None picks the
            fastest that can do this on the target platform. All but "plain" are differentiable once, in
            reverse mode.
        dropout_rate: of the attention weights, applied only with a `dropout_key`.
        dropout_key: one, or one for each row.
        output_weights: return the attention weights.

    Returns:
        The output, and the attention weights (after dropout) or None.

    Raises:
        ValueError: an unknown implementation, or one that cannot do this.
    """
    axes = mesh_axes()
    dropout = dropout_key is not None and dropout_rate > 0
    needs_weights = dropout or output_weights
    chosen = choose_implementation(implementation, query, mask, needs_weights).implementation
    if implementation is None and not needs_weights:
        out = one_query_attention(query, key, value, mask)
        if out is not None:
            return out, None
    if chosen == "plain":
        return _plain(query, key, value, mask, dropout_rate, dropout_key, output_weights)
    shards = _find_shards(axes, query, key)
    if chosen == "splash":
        from llama_jax.attention.splash import splash_attention, splash_kernel

        split = axes.size(*shards.heads), axes.size(*shards.sequence)
        kernel = splash_kernel(
            query.shape[1], key.shape[1], query.shape[2], *split, order=mask.order
        )
        return _over_shards(splash_attention, shards, kernel, query, key, value, mask), None
    return _over_shards(_RUN[chosen], shards, query, key, value, mask), None


def _plain(
    query: Array,
    key: Array,
    value: Array,
    mask: AttentionMask,
    dropout_rate: float,
    dropout_key: Array | None,
    output_weights: bool,
) -> tuple[Array, Array | None]:
    """`dot_product_attention`; dropout does not depend on the order of the tokens."""
    order = mask.order
    if order is not None:
        query, key, value, mask = jax.tree.map(
            lambda array: order.collect(array, 1), (query, key, value, mask._replace(order=None))
        )
    dense = dense_mask(mask, query.shape[1], key.shape[1])
    out, weights = dot_product_attention(query, key, value, dense, dropout_rate, dropout_key)
    if order is not None:
        out, weights = order.deal(out, 1), order.deal(order.deal(weights, 2), 3)
    return out, weights if output_weights else None


class Choice(NamedTuple):
    """The implementation that a call takes, and in words why it is not a faster one; None if none is."""

    implementation: str
    reason: str | None


def choose_implementation(
    implementation: str | None, query: Any, mask: AttentionMask, needs_weights: bool
) -> Choice:
    """The requested implementation, or for None the fastest that can do this.

    Args:
        query: [batch, q, heads, dim], real or abstract, as are the arrays of `mask`.
        needs_weights: the weights are returned or have dropout.

    Raises:
        ValueError: an unknown implementation, or one that cannot do this.
    """
    sequence_shards, platform = mesh_axes().size(SEQUENCE_AXIS), target_platform()

    def why_not(name: str) -> str | None:
        if name == "plain":
            return None
        homes = [home for home, kernels in _KERNELS.items() if name in kernels]
        if homes and platform not in homes:
            return f"the platform {platform!r}, expected {' or '.join(map(repr, homes))}"
        if needs_weights:
            return "attention weights or dropout of them, expected neither"
        if name not in _WHY_NOT:
            return None
        if mask.visible_until is not None:
            return "visible_until, expected none"
        return _WHY_NOT[name](query, mask, sequence_shards)

    if implementation is not None:
        if implementation not in get_args(Implementation):
            raise ValueError(
                f"attention_implementation: found {implementation!r}, expected None or one of "
                f"{', '.join(map(repr, get_args(Implementation)))}"
            )
        reason = why_not(implementation)
        if reason is not None:
            raise ValueError(
                f"attention_implementation={implementation!r}: found {reason}; without it, the fastest "
                "implementation that can do this is chosen"
            )
        return Choice(implementation, "requested")
    if query.shape[1] <= PLAIN_LENGTH:
        return Choice("plain", f"up to {PLAIN_LENGTH} tokens it is the fastest")
    kernels = _KERNELS.get(platform, ())
    reasons = [] if kernels else [f"no kernel for {platform}"]
    for name in (*kernels, "blocked", "plain"):
        reason = why_not(name)
        if reason is None:
            break
        reasons.append(f"{name}: found {reason}")
    return Choice(name, "; ".join(reasons) or None)


class _Shards(NamedTuple):
    """The mesh axes over which batch, queries and heads are split; () for none."""

    axes: MeshAxes
    batch: tuple[str, ...]
    sequence: tuple[str, ...]
    heads: tuple[str, ...]


def _find_shards(axes: MeshAxes, query: Array, key: Array) -> _Shards:
    """The axes that divide what they split; over the others every shard repeats the work."""
    batch, q, heads, _ = query.shape
    split = {}
    for dimension, size in (("batch", batch), ("sequence", q), ("heads", heads)):
        names = {"batch": BATCH_AXES, "sequence": (SEQUENCE_AXIS,), "heads": (TENSOR_AXIS,)}
        present = axes.present(*names[dimension])
        split[dimension] = () if size % axes.size(*present) else present
    # query heads of one shard must share its kv heads evenly
    if heads % math.lcm(key.shape[2], axes.size(*split["heads"])):
        split["heads"] = ()
    return _Shards(axes, **split)


def _over_shards(run: Callable[..., Array], shards: _Shards, *operands: Any) -> Array:
    """`run(*operands)` on every shard; the operands end with query, key, value and mask.

    Kernels and loops over blocks are opaque to XLA's partitioner, which would gather their operands or
    reject them. They get all keys in the order of the row, so that a block of queries sees a contiguous
    range of them, whatever the order of the queries.
    """
    axes = shards.axes
    batch, sequence, heads = (names or None for names in shards[1:])
    *kernel, query, key, value, mask = operands
    order = mask.order
    # of the same tokens as the queries; those of a cache come as they are held
    split_keys = sequence if mask.query_slots is None else None
    if order is not None or sequence:
        query_slots, _ = slots_of(mask, query.shape[1], key.shape[1])
        _, key_slots = slots_of(mask._replace(order=None), query.shape[1], key.shape[1])
        mask = mask._replace(query_slots=query_slots, key_slots=key_slots, order=None)

    def on_shard(*operands: Any) -> Array:
        *kernel, query, key, value, mask = operands
        if split_keys:
            key, value = _gather(key, split_keys), _gather(value, split_keys)
        if order is not None:
            key, value, is_token, segments = jax.tree.map(
                lambda array: order.collect(array, 1),
                (key, value, mask.key_is_token, mask.key_segments),
            )
            mask = mask._replace(key_is_token=is_token, key_segments=segments)
        return run(*kernel, query, key, value, mask)

    if not axes.free:
        return on_shard(*kernel, query, key, value, mask)
    # with fewer kv heads than shards, neighbors hold copies of the same one
    parts = math.lcm(key.shape[2], axes.size(*shards.heads)) // key.shape[2]
    if parts > 1:
        key, value = jnp.repeat(key, parts, axis=2), jnp.repeat(value, parts, axis=2)
    field_specs = {
        "query_slots": P(sequence),
        "key_slots": P(),
        "key_is_token": P(batch),
        "query_segments": P(batch, sequence),
        "key_segments": P(batch),
        "visible_until": P(batch),
    }
    mask_specs = mask._replace(
        **{name: spec for name, spec in field_specs.items() if getattr(mask, name) is not None}
    )
    query_spec, key_spec = P(batch, sequence, heads), P(batch, split_keys, heads)
    # without manual axes, of which it cannot tell the shape of a shard
    free_mesh = AbstractMesh(tuple(axes.mesh.shape[name] for name in axes.free), axes.free)
    kernel_specs = [
        k.manual_sharding_spec(NamedSharding(free_mesh, P(heads, sequence))) for k in kernel
    ]
    return jax.shard_map(
        on_shard,
        mesh=axes.mesh,
        in_specs=(*kernel_specs, query_spec, key_spec, key_spec, mask_specs),
        out_specs=query_spec,
        axis_names=set(axes.free),  # kernels reject a remaining one, even of size 1
        check_vma=False,
    )(*kernel, query, key, value, mask)


def _gather(
    array: Float[Array, "batch tokens heads dim"], axes: tuple[str, ...]
) -> Float[Array, "batch k heads dim"]:
    """The tokens of all shards; the transpose scatters the sum of their gradients.

    Tokens come first meanwhile: along another dimension, and in more than three, XLA's compiler for TPUs
    makes an all-reduce of the scatter, which sends twice as much.
    """
    batch, tokens, heads, dim = array.shape
    rows = array.swapaxes(0, 1).reshape(tokens, batch * heads, dim)
    rows = jax.lax.all_gather(rows, axes, axis=0, tiled=True)
    return rows.reshape(-1, batch, heads, dim).swapaxes(0, 1)
