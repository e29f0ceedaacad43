"""Attention of a decoding step on a CPU: a kernel reads the cache where it is.

XLA's matmuls transpose all keys and values of the cache first, in every step.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llama_jax.attention.masks import AttentionMask, dense_mask
from llama_jax.attention.plain import dot_product_attention
from llama_jax.numerics.cpu.available import step_kernels


def one_query_attention(
    query: Float[Array, "batch 1 heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
) -> Float[Array, "batch 1 heads dim"] | None:
    """`dot_product_attention` over a cache; None where there is no kernel for it.

    In bfloat16 the attention weights are not rounded, so that this is the more exact way.

    Args:
        query, key, value: of one dtype.
    """
    has_cache = query.shape[1] == 1 and mask.query_slots is not None
    if not has_cache or query.dtype not in (jnp.float32, jnp.bfloat16) or step_kernels() is None:
        return None
    visible = dense_mask(mask, 1, key.shape[1])[:, 0, 0]
    visible = jnp.broadcast_to(visible, key.shape[:2])
    keys, values = _heads_first(key), _heads_first(value)
    out = _attend(query[:, 0].astype(jnp.float32), keys, values, visible)
    return out[:, None].astype(query.dtype)


def _heads_first(x: Float[Array, "batch k kv_heads dim"]) -> Float[Array, "batch*kv_heads k dim"]:
    """As `generate` holds them: not a transpose, then, but the end of one."""
    return jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


@jax.custom_jvp
def _attend(
    query: Float[Array, "batch heads dim"],
    keys: Float[Array, "batch*kv_heads k dim"],
    values: Float[Array, "batch*kv_heads k dim"],
    visible: Bool[Array, "batch k"],
) -> Float[Array, "batch heads dim"]:
    kernels = step_kernels()
    assert kernels is not None, "see one_query_attention"
    out: Array = kernels.attend(query, keys, values, visible)
    return out


@_attend.defjvp
def _attend_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    def reference(query: Array, keys: Array, values: Array, visible: Array) -> Array:
        wide = (x.astype(jnp.float32).reshape(len(query), -1, *x.shape[1:]) for x in (keys, values))
        key, value = (jnp.moveaxis(x, 2, 1) for x in wide)
        out, _ = dot_product_attention(query[:, None], key, value, visible[:, None, None])
        return out[:, 0]

    return _attend(*primals), jax.jvp(reference, primals, tangents)[1]
