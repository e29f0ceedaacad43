"""Attention of many queries on a CPU by kernels of our own, where there are any (extra `cpu`).

They read queries, keys and values where they are, and no score leaves the caches. With a key/value cache
they see what is hidden when they run; XLA's program computes the scores of all slots, to be safe.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float, Int32

from llama_jax.attention.masks import AttentionMask, slots_of
from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.cpu.available import (
    flash_backward_kernel,
    flash_kernel,
    may_have_flash_kernel,
)

_COLUMNS = 32  # dim is a multiple of what the kernels compute at a time
# Fewer are not worth the seconds that it takes to compile a kernel once. With both kernels a training step
# of 56M parameters takes as long as before with sequences of 512, and 0.86 of it with 2,048 (docs/log.md).
_LEAST_QUERIES = 128
_LEAST_QUERIES_TO_TRAIN = 1024


def takes_flash(query: Any, key: Any, value: Any) -> bool:
    """Whether `flash_attention` computes this, by dtypes, sizes and the processor."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        target_platform() == "cpu"
        and (mesh.empty or mesh.size == 1)
        and all(x.dtype == jnp.float32 for x in (query, key, value))
        and query.shape[1] >= _LEAST_QUERIES
        and query.shape[3] % _COLUMNS == 0
        and query.shape[2] % key.shape[2] == 0
        and 0 not in (*query.shape, *key.shape)
        and may_have_flash_kernel()
    )


def takes_flash_gradients(query: Any, key: Any, value: Any) -> bool:
    """Whether `flash_gradients` computes those of `flash_attention`. A head of keys is one thread's."""
    is_long = query.shape[1] >= _LEAST_QUERIES_TO_TRAIN
    return is_long and key.shape[0] * key.shape[2] > 1 and takes_flash(query, key, value)


def flash_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    plain: Callable[..., Any],
) -> list[Array]:
    """`dot_product_attention` without the weights, where `takes_flash`, and what it keeps of each row.

    It has no derivatives of its own.

    Args:
        plain: the same for XLA, which runs it if numba does not work; it is also for those who look for
            matmuls in a program.

    Returns:
        The output, and the maximum and the sum of exponentials of each row, [batch, q, heads, 1].
    """
    return _call(_attend, plain, query, key, value, mask)


def flash_gradients(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    row_max: Float[Array, "batch q heads 1"],
    row_sum: Float[Array, "batch q heads 1"],
    delta: Float[Array, "batch q heads 1"],
    d_out: Float[Array, "batch q heads dim"],
    *,
    plain: Callable[..., Any],
) -> list[Array]:
    """The gradients of query, key and value, where `takes_flash_gradients`.

    Args:
        row_max, row_sum: what `flash_attention` kept.
        delta: the sum of the output times its gradient, of each row.
        d_out: the gradient of the output.
        plain: as for `flash_attention`.
    """
    operands = query, key, value, mask, row_max, row_sum, delta, d_out
    return _call(_differentiate, plain, *operands)


_kernel_call = Primitive("flash_attention")
_kernel_call.multiple_results = True


def _call(kernel: Callable[..., Any], plain: Callable[..., Any], *operands: Any) -> list[Array]:
    leaves, tree = jax.tree.flatten(operands)
    jaxpr = jax.make_jaxpr(plain)(*operands)
    out: list[Array] = _kernel_call.bind(*leaves, kernel=kernel, tree=tree, jaxpr=jaxpr)
    return out


@_kernel_call.def_impl
def _run(*leaves: Array, kernel: Callable[..., Any], tree: Any, jaxpr: ClosedJaxpr) -> list[Array]:
    out: list[Array] | None = kernel(*jax.tree.unflatten(tree, leaves))
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves) if out is None else out


def _attend(query: Array, key: Array, value: Array, mask: AttentionMask) -> list[Array] | None:
    kernel = flash_kernel()
    if kernel is None:
        return None
    out: list[Array] = kernel.attend(query, key, value, *_integers(query, key, mask))
    return out


def _differentiate(
    query: Array, key: Array, value: Array, mask: AttentionMask, *of_rows: Array
) -> list[Array] | None:
    kernel = flash_backward_kernel()
    if kernel is None or flash_kernel() is None:  # the scores of a row are rounded as they were
        return None
    operands = *_integers(query, key, mask), *of_rows
    out: list[Array] = kernel.gradients(query, key, value, *operands)
    return out


def _integers(query: Array, key: Array, mask: AttentionMask) -> list[Int32[Array, "..."]]:
    """What decides about visibility: slots, segments, and the last slot that sees a key."""
    batch, k = key.shape[:2]
    query_segments, key_segments = mask.query_segments, mask.key_segments
    if query_segments is None or key_segments is None:
        query_segments = jnp.zeros(query.shape[:2], jnp.int32)
        key_segments = jnp.zeros((batch, k), jnp.int32)
    limits = jnp.iinfo(jnp.int32)
    until = mask.visible_until
    if until is None:
        until = jnp.full((batch, k), limits.max, jnp.int32)
    if mask.key_is_token is not None:
        until = jnp.where(mask.key_is_token, until, limits.min)
    integers = *slots_of(mask, query.shape[1], k), query_segments, key_segments, until
    return [x.astype(jnp.int32) for x in integers]


@_kernel_call.def_abstract_eval
def _results(*leaves: Any, kernel: Any, tree: Any, jaxpr: ClosedJaxpr) -> Any:
    del leaves, kernel, tree
    return jaxpr.out_avals


def _batch(leaves: Any, axes: Any, **params: Any) -> tuple[list[Array], list[int]]:
    out = jax.vmap(partial(_run, **params), axes)(*leaves)
    return out, [0] * len(out)


batching.primitive_batchers[_kernel_call] = _batch
mlir.register_lowering(_kernel_call, mlir.lower_fun(_run, multiple_results=True), platform="cpu")
