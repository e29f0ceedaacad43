"""Attention that holds the scores: the plain formula, which can return and drop its weights."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Key

from llama_jax.numerics.matmul import einsum, working_dtype


def dot_product_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: Bool[Array, "b_or_1 1 q k"],
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, "*rows"] | None = None,
) -> tuple[Float[Array, "batch q heads dim"], Float[Array, "batch heads q k"]]:
    """softmax(query key^T / sqrt(dim)) value, head h attending to kv head h // (heads / kv_heads).

    Scores and softmax are float32 (float64 for float64); the weights are cast back to the query's dtype
    before the second matmul. A query that sees no key yields zeros, as in transformers' `sdpa`; its `eager`
    averages over all keys instead, future ones included.

    Args:
        mask: True where the query sees the key.
        dropout_rate: of the attention weights, applied only with a `dropout_key`.
        dropout_key: one, or one for each row.

    Returns:
        The output and the attention weights (after dropout), as transformers returns them.
    """
    batch, q, heads, dim = query.shape
    kv_heads = key.shape[2]
    working = working_dtype(query.dtype)
    grouped = query.reshape(batch, q, kv_heads, heads // kv_heads, dim)
    scores = einsum("bqngd,bknd->bngqk", grouped, key, out_dtype=working) * dim**-0.5
    visible = mask[:, :, None]  # one axis for kv heads, one for the heads of a group
    # the lowest finite number, not -inf: a row that sees no key must not turn into NaN
    scores = jnp.where(visible, scores, jnp.finfo(working).min)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0).astype(query.dtype)
    weights = checkpoint_name(weights, "attention")  # saved by remat="dots"
    if dropout_key is not None and dropout_rate > 0:
        keys = dropout_key if dropout_key.ndim else jax.random.split(dropout_key, batch)
        shape = weights.shape[1:]
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout_rate, shape))(keys)
        scale = 1 / (1 - dropout_rate) if dropout_rate < 1 else 0.0
        weights = jnp.where(kept, weights * scale, 0)
    out = einsum("bngqk,bknd->bqngd", weights, value, blocked=q > 1)
    out = checkpoint_name(out, "attention")
    return out.reshape(batch, q, heads, dim), weights.reshape(batch, heads, q, key.shape[1])
