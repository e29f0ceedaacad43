"""JAX's splash attention, a Pallas kernel for TPUs that skips masked blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from llama_jax.attention.masks import AttentionMask, causal_shares, sees_something
from llama_jax.attention.zigzag import ZigZag
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
    by_head = tuple(array.swapaxes(1, 2) for array in (scaled, key, value))
    out = _run(kernel, by_head, _segment_ids(mask, batch, q, k)).swapaxes(1, 2)
    if mask.key_is_token is not None:
        sees_any = sees_something(mask, q, k, block=_LANES)
        # the kernel averages over the keys of a row that sees none
        out = jnp.where(sees_any[:, :, None, None], out, 0)
    return out


@jax.custom_vjp
def _run(kernel: Any, by_head: tuple[Array, ...], segments: Any) -> Array:
    """The kernel for each row."""
    return jax.vmap(kernel)(*by_head, segments)


def _run_forward(kernel: Any, by_head: tuple[Array, ...], segments: Any) -> tuple[Array, Any]:
    out, transpose = jax.vjp(lambda *arrays: jax.vmap(kernel)(*arrays, segments), *by_head)
    # The kernel writes every logsumexp 128 times, and XLA would put off the slice that keeps one until
    # the backward pass needs it: 1 GiB for 65,536 tokens of 32 heads.
    return jax.lax.optimization_barrier((out, transpose))


def _run_backward(transpose: Any, cotangent: Array) -> tuple[None, tuple[Array, ...], None]:
    return None, transpose(cotangent), None


_run.defvjp(_run_forward, _run_backward)


def splash_kernel(
    q: int,
    k: int,
    heads: int,
    head_shards: int = 1,
    q_shards: int = 1,
    *,
    order: ZigZag | None = None,
    interpret: bool = False,
) -> Any:
    """The causal kernel for `q` queries and `k` keys.

    Args:
        head_shards, q_shards: how many shards the heads and the queries are split over.
        order: of the queries; the keys are in the order of the row.
        interpret: run the kernel as plain JAX, on any backend.
    """
    block_q, block_k = _blocks(q, k, q_shards, order)
    causal = _CausalMask((q, k))
    if order is not None:
        causal.q_sequence = order.slots(q)
    return splash.make_splash_mha(
        splash.MultiHeadMask([causal] * heads),
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


class _CausalMask(splash.CausalMask):
    """One whose blocks off the diagonal are single numbers: all that is asked of them is any() and all().

    Comparing all of their slots takes seconds for 32,768 tokens, and grows with the square.
    """

    def __getitem__(self, index: Any) -> np.ndarray:
        slots, keys = self.q_sequence[index[0]], index[1]
        if slots.max() < keys.start:
            return np.zeros((1, 1), bool)
        if slots.min() >= keys.stop - 1:
            return np.ones((1, 1), bool)
        return np.asarray(super().__getitem__(index))


def why_not_splash(query: Any, mask: AttentionMask, sequence_shards: int) -> str | None:
    """Why splash cannot do this, or None: it does full sequences in multiples of 128, without a cache."""
    seq = query.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{query.dtype}, expected bfloat16 or float32"
    if mask.query_slots is not None:
        return "a part of the sequence, expected the full sequence"
    if seq % (sequence_shards * _LANES):
        return f"{seq} tokens, expected a multiple of {_LANES} on each of {sequence_shards} shards"
    return None


def visited_shares(
    q: int, q_shards: int = 1, order: ZigZag | None = None
) -> Float[np.ndarray, " {q_shards}"]:
    """The fraction of its blocks that the causal kernel of `q` queries and keys visits, for each shard."""
    return causal_shares(q, q_shards, order, *_blocks(q, q, q_shards, order))


def _blocks(q: int, k: int, q_shards: int, order: ZigZag | None) -> tuple[int, int]:
    """Of queries and keys; one that lies in two chunks of the order would visit the keys of both."""
    block_q = _block(q // q_shards)
    if order is not None and order.chunk % _LANES == 0:
        block_q = min(block_q, _block(order.chunk))
    return block_q, _block(k)


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
