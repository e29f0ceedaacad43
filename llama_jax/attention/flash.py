"""Attention of many queries on a CPU by a kernel of our own, where there is one (extra `cpu`).

It reads queries, keys and values where they are, and no score leaves the caches. With a key/value cache it
sees what is hidden when it runs; XLA's program computes all scores of all slots, to be on the safe side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float

from llama_jax.attention.masks import AttentionMask, slots_of
from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.cpu.available import flash_kernel, may_have_flash_kernel

_COLUMNS = 32  # dim is a multiple of what the kernel computes at a time


def takes_flash(query: Any, key: Any, value: Any) -> bool:
    """Whether `flash_attention` computes this, by dtypes, sizes and the processor."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        target_platform() == "cpu"
        and (mesh.empty or mesh.size == 1)
        and all(x.dtype == jnp.float32 for x in (query, key, value))
        and query.shape[3] % _COLUMNS == 0
        and query.shape[2] % key.shape[2] == 0
        and 0 not in (*query.shape, *key.shape)
        and may_have_flash_kernel()
    )


def flash_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    plain: Callable[..., Any],
) -> Float[Array, "batch q heads dim"]:
    """`dot_product_attention` without the weights, where `takes_flash`. It has no derivatives.

    Args:
        plain: what XLA runs on the same operands if numba does not work; it is also for those who look for
            matmuls in a program.
    """
    leaves, tree = jax.tree.flatten((query, key, value, mask))
    jaxpr = jax.make_jaxpr(plain)(query, key, value, mask)
    out: Array = _flash_attention.bind(*leaves, tree=tree, jaxpr=jaxpr)
    return out


_flash_attention = Primitive("flash_attention")


@_flash_attention.def_impl
def _run(*leaves: Array, tree: Any, jaxpr: ClosedJaxpr) -> Array:
    kernel = flash_kernel()
    if kernel is None:
        (plain,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)
        return jnp.asarray(plain)
    query, key, value, mask = jax.tree.unflatten(tree, leaves)
    batch, k = key.shape[:2]
    query_segments, key_segments = mask.query_segments, mask.key_segments
    if query_segments is None:
        query_segments = jnp.zeros(query.shape[:2], jnp.int32)
        key_segments = jnp.zeros((batch, k), jnp.int32)
    limits = jnp.iinfo(jnp.int32)
    until = mask.visible_until
    if until is None:
        until = jnp.full((batch, k), limits.max, jnp.int32)
    if mask.key_is_token is not None:
        until = jnp.where(mask.key_is_token, until, limits.min)
    integers = *slots_of(mask, query.shape[1], k), query_segments, key_segments, until
    out: Array = kernel.attend(query, key, value, *(x.astype(jnp.int32) for x in integers))
    return out


@_flash_attention.def_abstract_eval
def _result(*leaves: Any, tree: Any, jaxpr: ClosedJaxpr) -> Any:
    del jaxpr
    return jax.tree.unflatten(tree, leaves)[0]


def _batch(leaves: Any, axes: Any, **params: Any) -> tuple[Array, int]:
    return jax.vmap(partial(_run, **params), axes)(*leaves), 0


batching.primitive_batchers[_flash_attention] = _batch
mlir.register_lowering(
    _flash_attention, mlir.lower_fun(_run, multiple_results=False), platform="cpu"
)
