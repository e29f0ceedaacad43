"""FlashAttention over packed rows as Pallas kernels for NVIDIA GPUs, compiled by Triton.

The forward and backward passes of FlashAttention-2 (arXiv:2307.08691) with three differences. Blocks of
keys that a block of queries cannot see are never visited, whatever hides them: causality, another document,
padding. Grouped queries share their keys in memory: one program sums the gradients of all heads of a group,
which also makes the backward pass deterministic. The residuals are a row's maximum and its sum of
exponentials, not their logsumexp, which is rounded more coarsely than either.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from llama_jax.attention.cudnn import why_not_ampere
from llama_jax.attention.masks import AttentionMask, slots_of

HEAD_DIMS = (32, 64, 128)
_NO_SEGMENT = jnp.iinfo(jnp.int32).min  # of padding, as a key
_LOG2_E = math.log2(math.e)
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class Blocks(NamedTuple):
    """Block sizes of one kernel, how many warps compute it and how many loads are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """The blocks of the three kernels; static under `jax.jit`.

    interpret: run them as plain JAX, on any backend.
    """

    forward: Blocks
    d_query: Blocks
    d_key_value: Blocks
    interpret: bool = False


def default_kernels(head_dim: int, interpret: bool = False) -> Kernels:
    """Blocks that sm_80, sm_90 and sm_100 compile without spilling registers."""
    return Kernels(
        forward=Blocks(128, 64, 8, 3),
        d_query=Blocks(128, 64, 8, 2),
        d_key_value=Blocks(64, 128 if head_dim < 128 else 64, 8, 2),
        interpret=interpret,
    )


def triton_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
    kernels: Kernels | None = None,
) -> Float[Array, "batch q heads dim"]:
    """Causal attention within documents; only where `why_not_triton` returns None.

    Scores, softmax and sums are float32. Differentiable once, in reverse.

    Args:
        kernels: their blocks; None takes `default_kernels`.
    """
    kernels = kernels or default_kernels(query.shape[3])
    operands = _operands(kernels, query, key, value, mask)
    return _attend(kernels, operands)[:, : query.shape[1]]


def why_not_triton(
    query: Float[Array, "batch q heads dim"], mask: AttentionMask, sequence_shards: int
) -> str | None:
    """Why the kernels cannot do this, or None."""
    del mask, sequence_shards
    if (reason := why_not_ampere()) is not None:
        return reason
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype}, expected bfloat16 or float16"
    if query.shape[3] not in HEAD_DIMS:
        return f"head_dim {query.shape[3]}, expected one of {', '.join(map(str, HEAD_DIMS))}"
    return None


class MaskOperands(NamedTuple):
    """What the kernels read of a mask, in whole blocks.

    query_slots, key_slots: places in the row, -1 for queries and the largest number for keys that are there
        to fill a block. query_segments, key_segments: None where there are no documents and no padding.
    """

    query_slots: Int[Array, " q"]
    key_slots: Int[Array, " k"]
    query_segments: Int[Array, "batch q"] | None
    key_segments: Int[Array, "batch k"] | None


class _Operands(NamedTuple):
    """What the kernels read, in whole blocks."""

    query: Float[Array, "batch q heads dim"]
    key: Float[Array, "batch k kv_heads dim"]
    value: Float[Array, "batch k kv_heads dim"]
    mask: MaskOperands


def _operands(
    kernels: Kernels, query: Array, key: Array, value: Array, mask: AttentionMask
) -> _Operands:
    batch, q = query.shape[:2]
    block_q, block_k = _largest_blocks(kernels)
    return _Operands(
        query=_fill(query, 1, block_q, 0),
        key=_fill(key, 1, block_k, 0),
        value=_fill(value, 1, block_k, 0),
        mask=mask_operands(kernels, batch, q, key.shape[1], mask),
    )


def mask_operands(
    kernels: Kernels, batch: int, q: int, k: int, mask: AttentionMask
) -> MaskOperands:
    """Documents and padding of `mask` as one number a token, filled up to whole blocks."""
    query_slots, key_slots = slots_of(mask, q, k)
    query_segments = key_segments = None
    if mask.query_segments is not None or mask.key_is_token is not None:
        query_segments = jnp.zeros((batch, q), jnp.int32)
        key_segments = jnp.zeros((batch, k), jnp.int32)
        if mask.query_segments is not None:
            assert mask.key_segments is not None
            query_segments, key_segments = mask.query_segments, mask.key_segments
        if mask.key_is_token is not None:
            key_segments = jnp.where(mask.key_is_token, key_segments, _NO_SEGMENT)
    block_q, block_k = _largest_blocks(kernels)
    return MaskOperands(
        query_slots=_fill(query_slots.astype(jnp.int32), 0, block_q, -1),
        key_slots=_fill(key_slots.astype(jnp.int32), 0, block_k, jnp.iinfo(jnp.int32).max),
        query_segments=_fill(query_segments, 1, block_q, 0),
        key_segments=_fill(key_segments, 1, block_k, _NO_SEGMENT),
    )


def _largest_blocks(kernels: Kernels) -> tuple[int, int]:
    """Of queries and of keys, all of them powers of two."""
    blocks = kernels[:3]
    return max(each.queries for each in blocks), max(each.keys for each in blocks)


def _fill(array: Any, axis: int, block: int, value: int) -> Any:
    """Filled up to whole blocks along `axis`."""
    if array is None or not (missing := -array.shape[axis] % block):
        return array
    widths = [(0, missing if dimension == axis else 0) for dimension in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value)


class _Rows(NamedTuple):
    """A row's largest score, in units of log2(e), and its sum of 2 ** (score - largest)."""

    maximum: Float[Array, "batch heads q"]
    sum: Float[Array, "batch heads q"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernels: Kernels, operands: _Operands) -> Array:
    return _forward(kernels, operands)[0]


def _forward(kernels: Kernels, operands: _Operands) -> tuple[Array, tuple[Any, ...]]:
    out, maximum, total = _run_forward(kernels, operands)
    out, rows = checkpoint_name((out, _Rows(maximum, total)), "attention")
    return out, (operands, out, rows)


def _backward(
    kernels: Kernels, residuals: tuple[_Operands, Array, _Rows], gradient: Array
) -> tuple[_Operands]:
    operands, out, rows = residuals
    # rowsum(dO * O) of FlashAttention
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    delta = delta.swapaxes(1, 2)
    d_query = _run_d_query(kernels, operands, rows, gradient, delta)
    d_key, d_value = _run_d_key_value(kernels, operands, rows, gradient, delta)
    no_gradient: Any = None  # of integers
    mask = MaskOperands(*[no_gradient] * 4)
    return (_Operands(d_query, d_key, d_value, mask),)


_attend.defvjp(_forward, _backward)


def visited_blocks(
    mask: MaskOperands, block_q: int, block_k: int
) -> Bool[Array, "batch q_blocks k_blocks"]:
    """Which blocks of keys hold any that a block of queries may see, by the ranges of both."""
    first_key = mask.key_slots.reshape(-1, block_k).min(1)
    last_query = mask.query_slots.reshape(-1, block_q).max(1)
    seen = (first_key[None, :] <= last_query[:, None])[None]
    if mask.query_segments is not None:
        assert mask.key_segments is not None
        batch = mask.key_segments.shape[0]
        real_query = mask.query_slots.reshape(-1, block_q) >= 0
        keys = mask.key_segments.reshape(batch, -1, block_k)
        queries = mask.query_segments.reshape(batch, -1, block_q)
        largest = jnp.iinfo(jnp.int32).max
        is_token = keys != _NO_SEGMENT
        key_low = jnp.where(is_token, keys, largest).min(2)
        query_low = jnp.where(real_query, queries, largest).min(2)
        query_high = jnp.where(real_query, queries, _NO_SEGMENT).max(2)
        overlap = (key_low[:, None, :] <= query_high[:, :, None]) & (
            keys.max(2)[:, None, :] >= query_low[:, :, None]
        )
        seen = seen & overlap
    return seen


def _first_and_end(seen: Bool[Array, "batch rows columns"]) -> Int[Array, "batch rows 2"]:
    """The range of columns that are true in each row, empty where none is."""
    count = seen.shape[2]
    some = seen.any(2)
    first = jnp.argmax(seen, axis=2)
    end = count - jnp.argmax(seen[:, :, ::-1], axis=2)
    return jnp.where(some[:, :, None], jnp.stack([first, end], axis=2), 0).astype(jnp.int32)


# kernels --------------------------------------------------------------------------------------------
# Grids are (blocks, heads, batch); a None in a block's shape leaves that axis out.


def _whole(size: int, heads_per_kv: int, dim: int) -> pl.BlockSpec:
    """All of a row's keys or values of one head; programs of a query head read its group's."""
    return pl.BlockSpec((None, size, None, dim), lambda i, h, b: (b, 0, h // heads_per_kv, 0))


def _block(size: int, dim: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size, None, dim), lambda i, h, b: (b, i, h, 0))


def _row_block(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, i))


def _slots(size: int | None, whole: int) -> pl.BlockSpec:
    if size is None:
        return pl.BlockSpec((whole,), lambda i, h, b: (0,))
    return pl.BlockSpec((size,), lambda i, h, b: (i,))


def _segments(present: Any, size: int | None, whole: int) -> pl.BlockSpec | None:
    if present is None:
        return None
    if size is None:
        return pl.BlockSpec((None, whole), lambda i, h, b: (b, 0))
    return pl.BlockSpec((None, size), lambda i, h, b: (b, i))


def _range(batch: int) -> pl.BlockSpec:
    """First and end of the blocks that a program visits; one row serves all where none has documents."""
    return pl.BlockSpec((None, None, 2), lambda i, h, b: (b if batch > 1 else 0, i, 0))


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contract one axis of each, accumulating in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _visible(query_slots: Array, key_slots: Array, query_segments: Any, key_segments: Any) -> Array:
    visible = key_slots[None, :] <= query_slots[:, None]
    if query_segments is not None:
        visible &= key_segments[None, :] == query_segments[:, None]
    return visible


def _forward_kernel(
    range_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_slots_ref: Any,
    k_slots_ref: Any,
    q_segments_ref: Any,
    k_segments_ref: Any,
    out_ref: Any,
    max_ref: Any,
    sum_ref: Any,
    *,
    block_k: int,
) -> None:
    scale = q_ref.shape[-1] ** -0.5
    query, query_slots = q_ref[...], q_slots_ref[...]
    query_segments = None if q_segments_ref is None else q_segments_ref[...]
    size, dim = query.shape

    def scores_of(block: Array) -> tuple[Array, Array]:
        at = pl.ds(block * block_k, block_k)
        scores = _dot(query, k_ref[at, :], (1, 1)) * (scale * _LOG2_E)
        key_segments = None if k_segments_ref is None else k_segments_ref[at]
        visible = _visible(query_slots, k_slots_ref[at], query_segments, key_segments)
        return jnp.where(visible, scores, _HIDDEN), visible

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, row_max, row_sum = carry
        scores, visible = scores_of(block)
        next_max = jnp.maximum(row_max, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - next_max[:, None]), 0.0)
        correction = jnp.exp2(row_max - next_max)
        row_sum = row_sum * correction + jnp.sum(weights, axis=1)
        values = v_ref[pl.ds(block * block_k, block_k), :]
        out = out * correction[:, None] + _dot(weights.astype(values.dtype), values, (1, 0))
        return out, next_max, row_sum

    first, end = range_ref[0], range_ref[1]
    row_max = jnp.full((size,), _HIDDEN, jnp.float32)
    start = jnp.zeros((size, dim), jnp.float32), row_max, jnp.zeros((size,), jnp.float32)
    out, row_max, row_sum = jax.lax.fori_loop(first, end, visit, start)
    # a row that sees nothing has an output of zeros
    row_sum = jnp.where(row_sum == 0, 1.0, row_sum)
    out_ref[...] = (out / row_sum[:, None]).astype(out_ref.dtype)
    max_ref[...] = row_max
    sum_ref[...] = row_sum


def _d_query_kernel(
    range_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_slots_ref: Any,
    k_slots_ref: Any,
    q_segments_ref: Any,
    k_segments_ref: Any,
    max_ref: Any,
    sum_ref: Any,
    gradient_ref: Any,
    delta_ref: Any,
    d_query_ref: Any,
    *,
    block_k: int,
) -> None:
    scale = q_ref.shape[-1] ** -0.5
    query, query_slots, gradient = q_ref[...], q_slots_ref[...], gradient_ref[...]
    query_segments = None if q_segments_ref is None else q_segments_ref[...]
    row_max, row_sum, delta = max_ref[...], sum_ref[...], delta_ref[...]

    def visit(block: Array, d_query: Array) -> Array:
        at = pl.ds(block * block_k, block_k)
        keys = k_ref[at, :]
        key_segments = None if k_segments_ref is None else k_segments_ref[at]
        visible = _visible(query_slots, k_slots_ref[at], query_segments, key_segments)
        scores = _dot(query, keys, (1, 1)) * (scale * _LOG2_E)
        exponentials = jnp.where(visible, jnp.exp2(scores - row_max[:, None]), 0.0)
        weights = exponentials / row_sum[:, None]
        d_weights = _dot(gradient, v_ref[at, :], (1, 1))
        d_scores = weights * (d_weights - delta[:, None]) * scale
        return d_query + _dot(d_scores.astype(keys.dtype), keys, (1, 0))

    d_query = jax.lax.fori_loop(
        range_ref[0], range_ref[1], visit, jnp.zeros(query.shape, jnp.float32)
    )
    d_query_ref[...] = d_query.astype(d_query_ref.dtype)


def _d_key_value_kernel(
    range_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_slots_ref: Any,
    k_slots_ref: Any,
    q_segments_ref: Any,
    k_segments_ref: Any,
    max_ref: Any,
    sum_ref: Any,
    gradient_ref: Any,
    delta_ref: Any,
    d_key_ref: Any,
    d_value_ref: Any,
    *,
    block_q: int,
    heads: int,
) -> None:
    scale = q_ref.shape[-1] ** -0.5
    keys, values, key_slots = k_ref[...], v_ref[...], k_slots_ref[...]
    key_segments = None if k_segments_ref is None else k_segments_ref[...]

    first, count = range_ref[0], range_ref[1] - range_ref[0]

    def visit(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # scores are transposed, [keys, queries], so that they are the left operands of both sums
        d_key, d_value = carry
        head = jax.lax.div(index, count)
        at = pl.ds((first + jax.lax.rem(index, count)) * block_q, block_q)
        query, gradient = q_ref[at, head, :], gradient_ref[at, head, :]
        query_segments: Any = None if q_segments_ref is None else q_segments_ref[at]
        visible = q_slots_ref[at][None, :] >= key_slots[:, None]
        if key_segments is not None:
            visible &= query_segments[None, :] == key_segments[:, None]
        scores = _dot(keys, query, (1, 1)) * (scale * _LOG2_E)
        exponentials = jnp.where(visible, jnp.exp2(scores - max_ref[head, at][None, :]), 0.0)
        weights = exponentials / sum_ref[head, at][None, :]
        d_value = d_value + _dot(weights.astype(gradient.dtype), gradient, (1, 0))
        d_weights = _dot(values, gradient, (1, 1))
        d_scores = weights * (d_weights - delta_ref[head, at][None, :]) * scale
        return d_key + _dot(d_scores.astype(query.dtype), query, (1, 0)), d_value

    carry = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(keys.shape, jnp.float32)
    carry = jax.lax.fori_loop(0, heads * count, visit, carry)
    d_key_ref[...] = carry[0].astype(d_key_ref.dtype)
    d_value_ref[...] = carry[1].astype(d_value_ref.dtype)


def _run_forward(kernels: Kernels, operands: _Operands) -> tuple[Array, Array, Array]:
    batch, q, heads, dim = operands.query.shape
    k, kv_heads = operands.key.shape[1:3]
    blocks = kernels.forward
    ranges = _first_and_end(visited_blocks(operands.mask, blocks.queries, blocks.keys))
    rows = jax.ShapeDtypeStruct((batch, heads, q), jnp.float32)
    return _call(
        partial(_forward_kernel, block_k=blocks.keys),
        blocks,
        kernels.interpret,
        name="attention_forward",
        grid=(q // blocks.queries, heads, batch),
        inputs=[
            (_range(ranges.shape[0]), ranges),
            (_block(blocks.queries, dim), operands.query),
            (_whole(k, heads // kv_heads, dim), operands.key),
            (_whole(k, heads // kv_heads, dim), operands.value),
            *_query_block_masks(operands, blocks.queries),
        ],
        outputs=[
            (_block(blocks.queries, dim), operands.query),
            (_row_block(blocks.queries), rows),
            (_row_block(blocks.queries), rows),
        ],
        matmuls=2,
        operands=operands,
    )


def _run_d_query(
    kernels: Kernels, operands: _Operands, rows: _Rows, gradient: Array, delta: Array
) -> Array:
    batch, q, heads, dim = operands.query.shape
    k, kv_heads = operands.key.shape[1:3]
    blocks = kernels.d_query
    ranges = _first_and_end(visited_blocks(operands.mask, blocks.queries, blocks.keys))
    row = _row_block(blocks.queries)
    (d_query,) = _call(
        partial(_d_query_kernel, block_k=blocks.keys),
        blocks,
        kernels.interpret,
        name="attention_d_query",
        grid=(q // blocks.queries, heads, batch),
        inputs=[
            (_range(ranges.shape[0]), ranges),
            (_block(blocks.queries, dim), operands.query),
            (_whole(k, heads // kv_heads, dim), operands.key),
            (_whole(k, heads // kv_heads, dim), operands.value),
            *_query_block_masks(operands, blocks.queries),
            (row, rows.maximum),
            (row, rows.sum),
            (_block(blocks.queries, dim), gradient),
            (row, delta),
        ],
        outputs=[(_block(blocks.queries, dim), operands.query)],
        matmuls=3,
        operands=operands,
    )
    return d_query


def _run_d_key_value(
    kernels: Kernels, operands: _Operands, rows: _Rows, gradient: Array, delta: Array
) -> tuple[Array, Array]:
    batch, q, heads, dim = operands.query.shape
    k, kv_heads = operands.key.shape[1:3]
    group = heads // kv_heads
    blocks = kernels.d_key_value
    seen = visited_blocks(operands.mask, blocks.queries, blocks.keys)
    ranges = _first_and_end(seen.swapaxes(1, 2))
    # all queries of the heads of one group
    queries = pl.BlockSpec((None, q, group, dim), lambda i, h, b: (b, 0, h, 0))
    row = pl.BlockSpec((None, group, q), lambda i, h, b: (b, h, 0))
    d_key, d_value = _call(
        partial(_d_key_value_kernel, block_q=blocks.queries, heads=group),
        blocks,
        kernels.interpret,
        name="attention_d_key_value",
        grid=(k // blocks.keys, kv_heads, batch),
        inputs=[
            (_range(ranges.shape[0]), ranges),
            (queries, operands.query),
            (_block(blocks.keys, dim), operands.key),
            (_block(blocks.keys, dim), operands.value),
            (_slots(None, q), operands.mask.query_slots),
            (_slots(blocks.keys, k), operands.mask.key_slots),
            (_segments(operands.mask.query_segments, None, q), operands.mask.query_segments),
            (_segments(operands.mask.key_segments, blocks.keys, k), operands.mask.key_segments),
            (row, rows.maximum),
            (row, rows.sum),
            (queries, gradient),
            (row, delta),
        ],
        outputs=[
            (_block(blocks.keys, dim), operands.key),
            (_block(blocks.keys, dim), operands.value),
        ],
        matmuls=4,
        operands=operands,
    )
    return d_key, d_value


def _query_block_masks(operands: _Operands, block_q: int) -> list[tuple[Any, Any]]:
    q, k = operands.query.shape[1], operands.key.shape[1]
    return [
        (_slots(block_q, q), operands.mask.query_slots),
        (_slots(None, k), operands.mask.key_slots),
        (_segments(operands.mask.query_segments, block_q, q), operands.mask.query_segments),
        (_segments(operands.mask.key_segments, None, k), operands.mask.key_segments),
    ]


def _call(
    kernel: Any,
    blocks: Blocks,
    interpret: bool,
    *,
    name: str,
    grid: tuple[int, ...],
    inputs: list[tuple[Any, Any]],
    outputs: list[tuple[Any, Any]],
    matmuls: int,
    operands: _Operands,
) -> Any:
    """`kernel` over the grid.

    Args:
        inputs, outputs: block specifications with arrays, or for outputs with anything of their shape.
        matmuls: of each pair of a query and a key; half of the pairs are counted, the causal ones.
    """
    batch, q, heads, dim = operands.query.shape
    k = operands.key.shape[1]
    pairs = batch * heads * q * k // 2
    specs, arrays = zip(*inputs, strict=True)
    out_specs, shapes = zip(*outputs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=list(specs),
        out_specs=list(out_specs),
        out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * dim * pairs * matmuls,
            transcendentals=pairs,
            bytes_accessed=sum(
                math.prod(each.shape) * each.dtype.itemsize
                for each in (*arrays, *shapes)
                if each is not None
            ),
        ),
        interpret=interpret,
        name=name,
    )(*arrays)
