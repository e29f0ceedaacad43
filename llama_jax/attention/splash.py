"""JAX's splash attention, a Pallas kernel for TPUs that skips masked blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from llama_jax.attention.masks import AttentionMask, sees_something
from llama_jax.numerics.matmul import working_dtype

_LANES, _LARGEST_BLOCK = 128, 512
_NO_SEGMENT = jnp.iinfo(jnp.int32).min  # of padding, as a key


def splash_attention(
    kernel: Any,
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
) -> Float[Array, "batch q heads dim"]:
    """Attention by a `kernel` from `splash_kernel`; only where `why_not_splash` returns None.

    The kernel takes scaled queries. Scaling rounds them, unless sqrt(dim) is a power of 2.
    """
    batch, q, _, dim = query.shape
    k = key.shape[1]
    scaled = (query.astype(working_dtype(query.dtype)) * dim**-0.5).astype(query.dtype)
    by_head = [array.swapaxes(1, 2) for array in (scaled, key, value)]
    out = jax.vmap(kernel)(*by_head, _segment_ids(mask, batch, q, k)).swapaxes(1, 2)
    if mask.key_is_token is not None:
        sees_any = sees_something(mask, q, k, block=_LANES)
        # the kernel averages over the keys of a row that sees none
        out = jnp.where(sees_any[:, :, None, None], out, 0)
    return out


def splash_kernel(
    q: int, k: int, heads: int, head_shards: int = 1, q_shards: int = 1, interpret: bool = False
) -> Any:
    """The causal kernel for `q` queries and `k` keys.

    Args:
        head_shards, q_shards: how many shards the heads and the queries are split over.
        interpret: run the kernel as plain JAX, on any backend.
    """
    block_q, block_k = (_block(size) for size in (q // q_shards, k))
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((q, k)) for _ in range(heads)]),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=head_shards,
        q_seq_shards=q_shards,
        residual_checkpoint_name="attention",  # saved by remat="dots"
        interpret=interpret,
    )


def why_not_splash(
    query: Float[Array, "batch q heads dim"], mask: AttentionMask, sequence_shards: int
) -> str | None:
    """Why splash cannot do this, or None: it does full sequences in multiples of 128, without a cache."""
    seq = query.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{query.dtype}, expected bfloat16 or float32"
    if mask.query_slots is not None:
        return "a part of the sequence, expected the full sequence"
    if seq % (sequence_shards * _LANES):
        return f"{seq} tokens, expected a multiple of {_LANES} on each of {sequence_shards} shards"
    return None


def visited_share(q: int, q_shards: int = 1) -> float:
    """The fraction of blocks that the causal kernel of `q` queries and keys visits, over all shards."""
    block_q, block_k = _block(q // q_shards), _block(q)
    visited = sum(-(-end // block_k) for end in range(block_q, q + 1, block_q))
    return visited / ((q // block_q) * (q // block_k))


def _block(size: int) -> int:
    """The largest power of two that divides `size`, up to a limit."""
    block = _LARGEST_BLOCK
    while size % block:
        block //= 2
    return block


def _segment_ids(mask: AttentionMask, batch: int, q: int, k: int) -> Any:
    """Segments, with padding as a segment among the keys; None without segments and padding."""
    if mask.key_is_token is None and mask.query_segments is None:
        return None
    queries: Int[Array, "batch q"] = jnp.zeros((batch, q), jnp.int32)
    keys: Int[Array, "batch k"] = jnp.zeros((batch, k), jnp.int32)
    if mask.query_segments is not None:
        assert mask.key_segments is not None
        queries, keys = mask.query_segments, mask.key_segments
    if mask.key_is_token is not None:
        keys = jnp.where(mask.key_is_token, keys, _NO_SEGMENT)
    return splash.SegmentIds(q=queries, kv=keys)
