"""The bodies of the kernels: what one program computes of its block of queries, or of keys.

A ref ends with the dimensions of a head, rounded up to a power of two, of which `dim` are there.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from llama_jax.attention.triton.ranges import MaskOperands

_LOG2_E = math.log2(math.e)
# The score of a hidden pair, and the least that a row's maximum can be, in exponents of 2: far enough apart
# that a hidden pair weighs exactly 0, in a row that sees nothing as well.
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
_LOWEST = _HIDDEN / 1024


class Rows(NamedTuple):
    """What the backward pass reads of each row of scores.

    maximum: in units of log2(e). inverse_sum: 1 / sum of 2 ** (score - maximum), 0 in a row that sees
        nothing. delta: FlashAttention's rowsum(dO * O).
    """

    maximum: Float[Array, "batch heads q"]
    inverse_sum: Float[Array, "batch heads q"]
    delta: Float[Array, "batch heads q"]


def forward_kernel(
    range_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask: MaskOperands,
    out_ref: Any,
    max_ref: Any,
    inverse_sum_ref: Any,
    *,
    dim: int,
    block: int,
) -> None:
    """Output, maximum and sum of a block of queries, over blocks of `block` keys."""
    query, size, unit = _load(q_ref, ..., dim), q_ref.shape[0], _unit(dim)
    is_visible = _visibility_to_keys(mask)

    def visit(head: Any, index: Array, masked: bool, carry: Any) -> Any:
        del head
        out, row_max, row_sum = carry
        at = pl.ds(index * block, block)
        scores = _dot(query, _load(k_ref, (at, slice(None)), dim), (1, 1))
        if masked:
            scores = jnp.where(is_visible(at), scores, _HIDDEN)
        next_max = jnp.maximum(row_max, jnp.max(scores, axis=1) * unit)
        weights = jnp.exp2(scores * unit - next_max[:, None])
        correction = jnp.exp2(row_max - next_max)
        row_sum = row_sum * correction + jnp.sum(weights, axis=1)
        values = _load(v_ref, (at, slice(None)), dim)
        out = out * correction[:, None] + _dot(weights.astype(values.dtype), values, (1, 0))
        return out, next_max, row_sum

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((size,), _LOWEST, jnp.float32),
        jnp.zeros((size,), jnp.float32),
    )
    out, row_max, row_sum = _over_blocks(range_ref, visit, start)
    # a row that sees nothing has an output of zeros
    inverse_sum = jnp.where(row_sum == 0, 0.0, 1 / jnp.where(row_sum == 0, 1.0, row_sum))
    _store(out_ref, out * inverse_sum[:, None], dim)
    max_ref[...] = row_max
    inverse_sum_ref[...] = inverse_sum


def d_query_kernel(
    range_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask: MaskOperands,
    rows: Rows,
    gradient_ref: Any,
    d_query_ref: Any,
    *,
    dim: int,
    block: int,
) -> None:
    """The gradient of a block of queries, over blocks of `block` keys."""
    unit = _unit(dim)
    query, gradient = _load(q_ref, ..., dim), _load(gradient_ref, ..., dim)
    row_max, delta = rows.maximum[...], rows.delta[...]
    is_visible = _visibility_to_keys(mask)

    def visit(head: Any, index: Array, masked: bool, d_query: Array) -> Array:
        del head
        at = pl.ds(index * block, block)
        keys = _load(k_ref, (at, slice(None)), dim)
        scores = _dot(query, keys, (1, 1))
        exponentials = jnp.exp2(scores * unit - row_max[:, None])
        if masked:
            exponentials = jnp.where(is_visible(at), exponentials, 0.0)
        d_weights = _dot(gradient, _load(v_ref, (at, slice(None)), dim), (1, 1))
        d_scores = exponentials * (d_weights - delta[:, None])
        return d_query + _dot(d_scores.astype(keys.dtype), keys, (1, 0))

    d_query = _over_blocks(range_ref, visit, jnp.zeros(query.shape, jnp.float32))
    # once for a row, not for each of its scores
    factor = rows.inverse_sum[...] * dim**-0.5
    _store(d_query_ref, d_query * factor[:, None], dim)


def d_key_value_kernel(
    range_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask: MaskOperands,
    rows: Rows,
    gradient_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    dim: int,
    block: int,
) -> None:
    """The gradients of a block of keys and values, over blocks of `block` queries of its group's heads.

    Scores are transposed, [keys, queries], so that they are the left operands of both sums.
    """
    unit = _unit(dim)
    keys, values = _load(k_ref, ..., dim), _load(v_ref, ..., dim)
    is_visible = _visibility_to_queries(mask)

    def visit(head: Any, index: Array, masked: bool, carry: Any) -> Any:
        d_key, d_value = carry
        at = pl.ds(index * block, block)
        query = _load(q_ref, (at, head, slice(None)), dim)
        scores = _dot(keys, query, (1, 1))
        exponentials = jnp.exp2(scores * unit - rows.maximum[head, at][None, :])
        if masked:
            exponentials = jnp.where(is_visible(at), exponentials, 0.0)
        weights = exponentials * rows.inverse_sum[head, at][None, :]
        gradient = _load(gradient_ref, (at, head, slice(None)), dim)
        d_value = d_value + _dot(weights.astype(gradient.dtype), gradient, (1, 0))
        d_weights = _dot(values, gradient, (1, 1))
        d_scores = weights * (d_weights - rows.delta[head, at][None, :])
        return d_key + _dot(d_scores.astype(query.dtype), query, (1, 0)), d_value

    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_key, d_value = _over_blocks(range_ref, visit, (zeros, zeros), heads=q_ref.shape[1])
    _store(d_key_ref, d_key * dim**-0.5, dim)
    _store(d_value_ref, d_value, dim)


def _unit(dim: int) -> float:
    """Of scores as the matmul leaves them, in exponents of 2."""
    return dim**-0.5 * _LOG2_E


def _over_blocks(
    range_ref: Any, visit: Callable[[Any, Array, bool, Any], Any], carry: Any, heads: int = 1
) -> Any:
    """`carry = visit(head, block, masked, carry)` for each head and each block of `range_ref` (`ranges`).

    Blocks with hidden pairs come first; in the others, most of a long document's, nothing is masked: that
    saves a quarter of the forward pass's instructions.
    """
    first, full_first, full_end, end = (range_ref[bound] for bound in range(4))
    before = full_first - first

    def masked_block(index: Array) -> Array:
        return jnp.where(index < before, first + index, full_end + (index - before))

    def full_block(index: Array) -> Array:
        return full_first + index

    loops = (
        (before + (end - full_end), masked_block, True),
        (full_end - full_first, full_block, False),
    )
    for count, block_of, masked in loops:

        def step(
            index: Array,
            carry: Any,
            count: Any = count,
            block_of: Any = block_of,
            masked: Any = masked,
        ) -> Any:
            if heads == 1:
                return visit(np.int32(0), block_of(index), masked, carry)
            # one loop over heads and blocks, so that loads for the next head start early
            head, index = jax.lax.div(index, count), jax.lax.rem(index, count)
            return visit(head, block_of(index), masked, carry)

        carry = jax.lax.fori_loop(0, heads * count, step, carry)
    return carry


def _visibility_to_keys(mask: MaskOperands) -> Callable[[Any], Bool[Array, "queries keys"]]:
    """Of a block of queries and the keys at some place."""
    query_slots = mask.query_slots[...]
    query_segments = None if mask.query_segments is None else mask.query_segments[...]

    def is_visible(at: Any) -> Bool[Array, "queries keys"]:
        visible = mask.key_slots[at][None, :] <= query_slots[:, None]
        if query_segments is None or mask.key_segments is None:
            return visible
        return visible & (mask.key_segments[at][None, :] == query_segments[:, None])

    return is_visible


def _visibility_to_queries(mask: MaskOperands) -> Callable[[Any], Bool[Array, "keys queries"]]:
    """Of a block of keys and the queries at some place."""
    key_slots = mask.key_slots[...]
    key_segments = None if mask.key_segments is None else mask.key_segments[...]

    def is_visible(at: Any) -> Bool[Array, "keys queries"]:
        visible = key_slots[:, None] <= mask.query_slots[at][None, :]
        if key_segments is None or mask.query_segments is None:
            return visible
        return visible & (key_segments[:, None] == mask.query_segments[at][None, :])

    return is_visible


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Contract one axis of each, accumulating in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _load(ref: Any, index: Any, dim: int) -> Array:
    """Vectors of a head, zeros beyond `dim`."""
    if ref.shape[-1] == dim:
        return ref[index]
    return plgpu.load(ref.at[index], mask=_is_dimension(ref, dim), other=0.0)


def _store(ref: Any, vectors: Array, dim: int) -> None:
    vectors = vectors.astype(ref.dtype)
    if ref.shape[-1] == dim:
        ref[...] = vectors
    else:
        plgpu.store(ref.at[...], vectors, mask=_is_dimension(ref, dim))


def _is_dimension(ref: Any, dim: int) -> Bool[Array, "1 size"]:
    return (jnp.arange(ref.shape[-1], dtype=jnp.int32) < dim)[None, :]
