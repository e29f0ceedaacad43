"""FlashAttention-2 (arXiv:2307.08691) over packed rows: the calls of the kernels, and the derivative.

It differs from the paper in three ways. Blocks of keys that a block of queries cannot see are not visited,
whatever hides them: causality, another document, padding. Grouped queries share their keys in memory: one
program sums the gradients of all heads of a group. The residuals are a row's maximum and the inverse of its
sum of exponentials, not their logsumexp, which is rounded more coarsely than either.

Every number is summed by one program in one order: the gradients are the same bits in every run.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from llama_jax.attention.cudnn import why_not_ampere
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.triton.blocks import (
    LARGEST_HEAD_DIM,
    Blocks,
    Kernels,
    default_kernels,
    largest_blocks,
)
from llama_jax.attention.triton.kernels import (
    Rows,
    d_key_value_kernel,
    d_query_kernel,
    forward_kernel,
)
from llama_jax.attention.triton.ranges import (
    MaskOperands,
    Visible,
    fill,
    mask_operands,
    ranges,
    visible_blocks,
)


def triton_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    kernels: Kernels | None = None,
) -> Float[Array, "batch q heads dim"]:
    """Causal attention within documents; only where `why_not_triton` returns None.

    Scores, softmax and sums are float32. Differentiable once, in reverse; always deterministic.

    Args:
        kernels: their blocks; None takes `default_kernels`.
    """
    batch, q = query.shape[:2]
    kernels = kernels or default_kernels(query.shape[3])
    block_q, block_k = largest_blocks(kernels)
    operands = _Operands(
        query=fill(query, 1, block_q, 0),
        key=fill(key, 1, block_k, 0),
        value=fill(value, 1, block_k, 0),
        mask=mask_operands(kernels, batch, q, key.shape[1], mask),
    )
    return _attend(kernels, operands)[:, :q]


def why_not_triton(query: Any, mask: AttentionMask, sequence_shards: int) -> str | None:
    """Why the kernels cannot do this, or None."""
    del mask, sequence_shards
    dim = query.shape[3]
    if (reason := why_not_ampere()) is not None:
        return reason
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype}, expected bfloat16 or float16"
    if dim % 8 or dim > LARGEST_HEAD_DIM:
        return f"head_dim {dim}, expected a multiple of 8 up to {LARGEST_HEAD_DIM}"
    return None


class _Operands(NamedTuple):
    """What the kernels read, in whole blocks."""

    query: Float[Array, "batch q heads dim"]
    key: Float[Array, "batch k kv_heads dim"]
    value: Float[Array, "batch k kv_heads dim"]
    mask: MaskOperands


class _Residuals(NamedTuple):
    operands: _Operands
    out: Float[Array, "batch q heads dim"]
    maximum: Float[Array, "batch heads q"]
    inverse_sum: Float[Array, "batch heads q"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernels: Kernels, operands: _Operands) -> Array:
    return _forward(kernels, operands)[0]


def _forward(kernels: Kernels, operands: _Operands) -> tuple[Array, _Residuals]:
    query, blocks = operands.query, kernels.forward
    batch, q, heads, dim = query.shape
    specs = _specs_by_query(operands, blocks.queries)
    visible = visible_blocks(operands.mask, blocks.queries, blocks.keys)
    row = jax.ShapeDtypeStruct((batch, heads, q), jnp.float32)
    outputs = _call(
        partial(forward_kernel, dim=dim, block=blocks.keys),
        blocks,
        kernels.interpret,
        name="attention_forward",
        grid=specs.grid,
        inputs=(ranges(visible), *operands),
        in_specs=(specs.range, specs.query, specs.key, specs.key, specs.mask),
        outputs=(query, row, row),
        out_specs=(specs.query, specs.row, specs.row),
        matmuls=2,
    )
    # saved by remat="dots"
    out, maximum, inverse_sum = checkpoint_name(outputs, "attention")
    return out, _Residuals(operands, out, maximum, inverse_sum)


def _backward(kernels: Kernels, residuals: _Residuals, gradient: Array) -> tuple[_Operands]:
    operands, out, maximum, inverse_sum = residuals
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    rows = Rows(maximum, inverse_sum, delta.swapaxes(1, 2))
    d_query = _d_query(kernels, operands, rows, gradient)
    d_key, d_value = _d_key_value(kernels, operands, rows, gradient)
    no_gradient: Any = None  # of integers
    return (_Operands(d_query, d_key, d_value, MaskOperands(*[no_gradient] * 4)),)


_attend.defvjp(_forward, _backward)


def _d_query(kernels: Kernels, operands: _Operands, rows: Rows, gradient: Array) -> Array:
    blocks = kernels.d_query
    specs = _specs_by_query(operands, blocks.queries)
    visible = visible_blocks(operands.mask, blocks.queries, blocks.keys)
    (d_query,) = _call(
        partial(d_query_kernel, dim=operands.query.shape[3], block=blocks.keys),
        blocks,
        kernels.interpret,
        name="attention_d_query",
        grid=specs.grid,
        inputs=(ranges(visible), *operands, rows, gradient),
        in_specs=(
            *(specs.range, specs.query, specs.key, specs.key, specs.mask),
            *(Rows(*[specs.row] * 3), specs.query),
        ),
        outputs=(operands.query,),
        out_specs=(specs.query,),
        matmuls=3,
    )
    return d_query


def _d_key_value(
    kernels: Kernels, operands: _Operands, rows: Rows, gradient: Array
) -> tuple[Array, Array]:
    blocks = kernels.d_key_value
    specs = _specs_by_key(operands, blocks.keys)
    some, every = visible_blocks(operands.mask, blocks.queries, blocks.keys)
    visible = Visible(some.swapaxes(1, 2), every.swapaxes(1, 2))
    d_key, d_value = _call(
        partial(d_key_value_kernel, dim=operands.query.shape[3], block=blocks.queries),
        blocks,
        kernels.interpret,
        name="attention_d_key_value",
        grid=specs.grid,
        inputs=(ranges(visible), *operands, rows, gradient),
        in_specs=(
            *(specs.range, specs.query, specs.key, specs.key, specs.mask),
            *(Rows(*[specs.row] * 3), specs.query),
        ),
        outputs=(operands.key, operands.value),
        out_specs=(specs.key, specs.key),
        matmuls=4,
    )
    return d_key, d_value


def _padded(dim: int) -> int:
    """The size of a head's vectors in the kernels: a power of two, and at least what a matmul takes."""
    return max(16, pl.next_power_of_2(dim))


# stands in named tuples where their arrays do
_BlockSpec: Any = pl.BlockSpec


class _Specs(NamedTuple):
    """What a program of a kernel sees of each array: its block, or all of a row.

    Grids are (blocks, heads, batch); a None in a block's shape leaves that axis out.
    """

    grid: tuple[int, int, int]
    range: Any
    query: Any
    key: Any
    mask: Any
    row: Any


def _specs_by_query(operands: _Operands, block: int) -> _Specs:
    """A program has a block of queries of one head, and all keys of its group."""
    batch, q, heads, dim = operands.query.shape
    k, kv_heads = operands.key.shape[1:3]
    size, group, last = _padded(dim), heads // kv_heads, q // block - 1
    has_segments = operands.mask.query_segments is not None
    # last queries first: with the most keys, they take the longest
    return _Specs(
        grid=(q // block, heads, batch),
        range=_BlockSpec((None, None, 4), lambda i, h, b: (b if has_segments else 0, last - i, 0)),
        query=_BlockSpec((None, block, None, size), lambda i, h, b: (b, last - i, h, 0)),
        key=_BlockSpec((None, k, None, size), lambda i, h, b: (b, 0, h // group, 0)),
        mask=MaskOperands(
            query_slots=_BlockSpec((block,), lambda i, h, b: (last - i,)),
            key_slots=_BlockSpec((k,), lambda i, h, b: (0,)),
            query_segments=_BlockSpec((None, block), lambda i, h, b: (b, last - i))
            if has_segments
            else None,
            key_segments=_BlockSpec((None, k), lambda i, h, b: (b, 0)) if has_segments else None,
        ),
        row=_BlockSpec((None, None, block), lambda i, h, b: (b, h, last - i)),
    )


def _specs_by_key(operands: _Operands, block: int) -> _Specs:
    """A program has a block of keys of one head, and all queries of the heads of its group."""
    batch, q, heads, dim = operands.query.shape
    k, kv_heads = operands.key.shape[1:3]
    size, group = _padded(dim), heads // kv_heads
    has_segments = operands.mask.query_segments is not None
    return _Specs(
        grid=(k // block, kv_heads, batch),
        range=_BlockSpec((None, None, 4), lambda i, h, b: (b if has_segments else 0, i, 0)),
        query=_BlockSpec((None, q, group, size), lambda i, h, b: (b, 0, h, 0)),
        key=_BlockSpec((None, block, None, size), lambda i, h, b: (b, i, h, 0)),
        mask=MaskOperands(
            query_slots=_BlockSpec((q,), lambda i, h, b: (0,)),
            key_slots=_BlockSpec((block,), lambda i, h, b: (i,)),
            query_segments=_BlockSpec((None, q), lambda i, h, b: (b, 0)) if has_segments else None,
            key_segments=_BlockSpec((None, block), lambda i, h, b: (b, i))
            if has_segments
            else None,
        ),
        row=_BlockSpec((None, group, q), lambda i, h, b: (b, h, 0)),
    )


def _call(
    kernel: Any,
    blocks: Blocks,
    interpret: bool,
    *,
    name: str,
    grid: tuple[int, ...],
    inputs: Any,
    in_specs: Any,
    outputs: Any,
    out_specs: Any,
    matmuls: int,
) -> Any:
    """`kernel` over the grid.

    Args:
        outputs: anything of their shapes and dtypes.
        matmuls: of each pair of a query and a key; half of the pairs are counted, the causal ones.
    """
    _, query, key = inputs[:3]
    batch, q, heads, dim = query.shape
    pairs = batch * heads * q * key.shape[1] // 2
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in outputs),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * dim * pairs * matmuls,
            transcendentals=pairs,
            bytes_accessed=sum(
                math.prod(each.shape) * each.dtype.itemsize
                for each in jax.tree.leaves((inputs, outputs))
            ),
        ),
        interpret=interpret,
        name=name,
    )
    # JAX never drops a pallas_call whose results are not used, but does drop a jitted function: where
    # remat="dots" has saved the results of the forward kernel, it must not run again
    return jax.jit(call)(*inputs)
