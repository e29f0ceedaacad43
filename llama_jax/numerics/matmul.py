"""Matmuls that accumulate in float32, forward and backward.

JAX's own transpose rule of a bfloat16 matmul with `preferred_element_type=float32` multiplies a float32
cotangent with a bfloat16 operand and accumulates in bfloat16. Here the cotangent is cast to the operand's
dtype, as PyTorch does, and both backward matmuls accumulate in float32 again.
"""

import string
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama_jax.numerics.backend import is_partitioned, target_platform
from llama_jax.numerics.many_rows import many_rows_matmul, takes_many_rows


def working_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of accumulation, norms, softmax, angles and losses: float64 for float64, else float32.

    This is what lets the whole model run in float64, where rounding cannot hide a difference.
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def einsum(
    spec: str,
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    out_dtype: jnp.dtype | None = None,
    *,
    blocked: bool = True,
    reduce_dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """`jnp.einsum(spec, a, b)` accumulated in float32 (float64 for float64) and rounded once.

    Args:
        spec: explicit subscripts for two operands; an index of one operand alone must be in the result.
        a, b: operands of the same dtype.
        out_dtype: dtype of the result; None keeps the operands'.
        blocked: let float32 on CPU be summed in blocks, which rounds less. Decoding steps turn it off: they
            are bound by reading `b`, and XLA would copy every block of it.
        reduce_dtype: for the gradient of `b`, see `weight_gradient`.

    Raises:
        ValueError: operands of different dtypes.
    """
    if a.dtype != b.dtype:
        raise ValueError(f"einsum: found {a.dtype} and {b.dtype}, expected operands of one dtype")
    out_dtype = jnp.dtype(out_dtype or a.dtype)
    if working_dtype(a.dtype) == a.dtype:
        # nothing to round: plain JAX, which has forward mode and higher derivatives
        multiply = _blocked_einsum if blocked else _plain_einsum
        return multiply(spec, a, b).astype(out_dtype)
    return _low_precision_einsum(spec, out_dtype, reduce_dtype, a, b)


def weight_gradient(
    spec: str,
    cotangent: Float[Array, "..."],
    x: Float[Array, "..."],
    reduce_dtype: DTypeLike | None,
) -> Float[Array, "..."]:
    """`einsum(spec, cotangent, x)`, of which every device of a mesh may have a part.

    Each part is accumulated in float32. XLA then adds up what the matmuls of the devices return, so the
    parts travel in the dtype that these are asked to return.

    Args:
        reduce_dtype: that dtype, for operands in bfloat16 or float16; None is float32.
    """
    if reduce_dtype is None or working_dtype(x.dtype) == x.dtype:
        return einsum(spec, cotangent, x)
    return wide_einsum(spec, cotangent, x, reduce_dtype).astype(x.dtype)


class _Subscripts(NamedTuple):
    """An einsum specification of two operands, and the role of its indices."""

    a: str
    b: str
    out: str

    @property
    def batch(self) -> str:
        """Indices of both operands that the result keeps."""
        return "".join(index for index in self.a if index in self.b and index in self.out)

    @property
    def contracted(self) -> str:
        """Indices of both operands that are summed over."""
        return "".join(index for index in self.a if index in self.b and index not in self.out)

    @property
    def rows(self) -> str:
        """Indices of `a` alone."""
        return "".join(index for index in self.a if index not in self.b)

    @property
    def columns(self) -> str:
        """Indices of `b` alone."""
        return "".join(index for index in self.b if index not in self.a)


def _parse(spec: str) -> _Subscripts:
    operands, out = spec.split("->")
    a, b = operands.split(",")
    return _Subscripts(a, b, out)


# XLA's float32 matmul on CPU accumulates long rows in one pass; PyTorch's library does so in blocks of
# smaller depth, which rounds less: 1.5 times less at a depth of 576. So do we, in a limited number of
# blocks: a few more cost little, twice as many cost twice the time. A single row (decoding) takes another
# path in XLA, which needs no help.
_BLOCK_DEPTH, _MAX_BLOCKS = 192, 32
_FINE_BLOCK_DEPTH, _MAX_FINE_BLOCKS = 144, 6
# For fewer rows than this, PyTorch's library on Intel rounds 1.5 times less again. Time is that of reading
# the weights then, whatever the number of blocks.
_MANY_ROWS, _FEW_ROWS_BLOCK_DEPTH = 16, 48


def _block_count(depth: int, rows: int) -> int:
    if rows < _MANY_ROWS:
        return min(-(-depth // _FEW_ROWS_BLOCK_DEPTH), _MAX_BLOCKS)
    fine = min(-(-depth // _FINE_BLOCK_DEPTH), _MAX_FINE_BLOCKS)
    return max(fine, min(-(-depth // _BLOCK_DEPTH), _MAX_BLOCKS))


def _blocked_einsum(spec: str, a: Array, b: Array) -> Array:
    """`jnp.einsum`; float32 on CPU is a sum over blocks of a contracted index, and so are its gradients."""
    if a.dtype != jnp.float32 or target_platform() != "cpu":
        return _plain_einsum(spec, a, b)
    contracted = _parse(spec).contracted
    if len(contracted) != 1:
        return _plain_einsum(spec, a, b)
    depth = a.shape[spec.index(contracted)]
    rows = a.size // depth
    blocks = _block_count(depth, rows)
    operands = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b))
    if takes_many_rows(spec, a, b):
        loop = _by_kernel.trace(spec, a.dtype, *operands).jaxpr
    elif blocks < 2 or rows < 2:
        return _plain_einsum(spec, a, b)
    else:
        loop = _loop_over_blocks.trace(spec, -(-depth // blocks), *operands).jaxpr
    out: Array = _sum_of_blocks.bind(a, b, spec=spec, jaxpr=loop)
    return out


# a kernel has the loop within it
_by_kernel = jax.jit(many_rows_matmul, static_argnums=(0, 1))


@partial(jax.jit, static_argnums=(0, 1))
def _loop_over_blocks(spec: str, size: int, a: Array, b: Array) -> Array:
    """`jnp.einsum` as a sum over blocks of `size` elements of the contracted index.

    It is a loop so that only one sum is in memory: results of 2048 x 1376 leave the cache otherwise, and
    take as long to add up as to compute.
    """
    subscripts = _parse(spec)
    axes = [of.index(subscripts.contracted) for of in (subscripts.a, subscripts.b)]
    full, rest = divmod(a.shape[axes[0]], size)

    def block(start: int | Array, size: int) -> Array:
        parts = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            for x, axis in zip((a, b), axes, strict=True)
        )
        return _plain_einsum(spec, *parts)

    def add_block(number: Array, total: Array) -> Array:
        return total + block(number * size, size)

    total = jax.lax.fori_loop(1, full, add_block, block(0, size))
    return total + block(full * size, rest) if rest else total


# A primitive, because JAX would transpose the loop into one that writes the gradients block by block, each
# summed over all of its own contracted index at once. These are matmuls too, and here they are sums over
# blocks as well. The loop is a parameter for those who look for matmuls in a program.
_sum_of_blocks = Primitive("sum_of_blocks")


@_sum_of_blocks.def_impl
def _run(a: Array, b: Array, *, spec: str, jaxpr: ClosedJaxpr) -> Array:
    del spec
    (out,) = jaxpr_as_fun(jaxpr)(a, b)
    return out


@_sum_of_blocks.def_abstract_eval
def _result(a: Any, b: Any, *, spec: str, jaxpr: ClosedJaxpr) -> Any:
    del a, b, spec
    return jaxpr.out_avals[0]


def _transpose_in_a(cotangent: Array, a: Any, b: Array, *, spec: str, jaxpr: ClosedJaxpr) -> Array:
    del a, jaxpr
    of = _parse(spec)
    return _gradient_einsum(f"{of.out},{of.b}->{of.a}", cotangent, b)


def _transpose_in_b(cotangent: Array, a: Array, b: Any, *, spec: str, jaxpr: ClosedJaxpr) -> Array:
    del b, jaxpr
    of = _parse(spec)
    return _gradient_einsum(f"{of.out},{of.a}->{of.b}", cotangent, a)


def _gradient_einsum(spec: str, cotangent: Array, other: Array) -> Array:
    """`_blocked_einsum`, but not over an index that a mesh may split, such as the tokens of its data axis.

    XLA would gather the operands, to cut blocks from them, where it can multiply each part on its device.
    """
    multiply = _plain_einsum if is_partitioned() else _blocked_einsum
    return multiply(spec, cotangent, other)


def _batch(
    operands: Sequence[Array],
    axes: Sequence[int | None],
    *,
    spec: str,
    jaxpr: ClosedJaxpr,
) -> tuple[Array, int]:
    """One more index of the operands that have a batch, and of the result."""
    del jaxpr
    index = next(letter for letter in string.ascii_letters if letter not in spec)
    of = _parse(spec)
    batched = (
        subscripts if axis is None else subscripts[:axis] + index + subscripts[axis:]
        for subscripts, axis in zip((of.a, of.b), axes, strict=True)
    )
    return _blocked_einsum(f"{','.join(batched)}->{index}{of.out}", *operands), 0


ad.defbilinear(_sum_of_blocks, _transpose_in_a, _transpose_in_b)
batching.primitive_batchers[_sum_of_blocks] = _batch
mlir.register_lowering(_sum_of_blocks, mlir.lower_fun(_run, multiple_results=False))


def _plain_einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=a.dtype)


def wide_einsum(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """`jnp.einsum(spec, a, b)`, accumulated and returned in `dtype`; its derivative is JAX's own."""
    if dtype == jnp.float32 and takes_many_rows(spec, a, b):
        return many_rows_matmul(spec, jnp.dtype(dtype), a, b)
    if a.dtype in (jnp.bfloat16, jnp.float16) and target_platform() == "cpu":
        return _half_precision_cpu_einsum(_parse(spec), a, b, dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


# XLA's CPU backend decides early which half-precision matmuls go to its library, and widens the operands of
# the others; it folds transposes into matmuls later. A matmul that it kept in half precision can then have
# a layout that the library does not support, and ends as "UNIMPLEMENTED: Unsupported element type for
# DotThunk". Hence the barriers: no transpose reaches the matmul through them.
def _half_precision_cpu_einsum(
    subscripts: _Subscripts, a: Array, b: Array, dtype: DTypeLike
) -> Array:
    batch, contracted = subscripts.batch, subscripts.contracted
    rows, columns = subscripts.rows, subscripts.columns
    if not batch:
        indices_a = subscripts.a
        if len(contracted) == 1:
            a, indices_a = _contracted_last(a, indices_a, contracted)
        # not `b`: a decoding step would write the weights to memory before it multiplies with them
        a = jax.lax.optimization_barrier(a)
        spec = f"{indices_a},{subscripts.b}->{subscripts.out}"
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)

    order_a = batch + rows + contracted
    # both layouts of the second operand are fast: take the one it has
    is_last = subscripts.b[-1] in contracted
    order_b = batch + (columns + contracted if is_last else contracted + columns)
    a, b = _transpose(a, subscripts.a, order_a), _transpose(b, subscripts.b, order_b)
    a, b = jax.lax.optimization_barrier((a, b))
    contracting = (
        [order_a.index(index) for index in contracted],
        [order_b.index(index) for index in contracted],
    )
    leading = list(range(len(batch)))
    out = jax.lax.dot_general(a, b, (contracting, (leading, leading)), preferred_element_type=dtype)
    out = jax.lax.optimization_barrier(out)
    return _transpose(out, batch + rows + columns, subscripts.out)


def _transpose(array: Array, indices: str, order: str) -> Array:
    return jnp.transpose(array, [indices.index(index) for index in order])


def _contracted_last(a: Array, indices: str, contracted: str) -> tuple[Array, str]:
    """`a` with its contracted index last, and the new order of its indices.

    XLA's bfloat16 matmul on CPU wants it there, and makes any other a float32 matmul, half as fast. XLA
    would fold a plain transpose into the matmul again; it does not if the index is split in two on the way.
    """
    axis = indices.index(contracted)
    depth = a.shape[axis]
    if a.dtype != jnp.bfloat16 or axis == a.ndim - 1 or depth % 2:
        return a, indices
    halves = a.reshape(*a.shape[:axis], 2, depth // 2, *a.shape[axis + 1 :])
    last = jnp.moveaxis(halves, (axis, axis + 1), (-2, -1))
    return last.reshape(*last.shape[:-2], depth), indices.replace(contracted, "") + contracted


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _low_precision_einsum(
    spec: str, out_dtype: jnp.dtype, reduce_dtype: DTypeLike | None, a: Array, b: Array
) -> Array:
    if out_dtype == a.dtype and takes_many_rows(spec, a, b):
        return many_rows_matmul(spec, out_dtype, a, b)
    return wide_einsum(spec, a, b, jnp.dtype(jnp.float32)).astype(out_dtype)


def _forward(
    spec: str, out_dtype: jnp.dtype, reduce_dtype: DTypeLike | None, a: Array, b: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _low_precision_einsum(spec, out_dtype, reduce_dtype, a, b), (a, b)


def _backward(
    spec: str,
    out_dtype: jnp.dtype,
    reduce_dtype: DTypeLike | None,
    operands: tuple[Array, Array],
    cotangent: Array,
) -> tuple[Array, Array]:
    a, b = operands
    subscripts = _parse(spec)
    cotangent = cotangent.astype(a.dtype)
    spec_a = f"{subscripts.out},{subscripts.b}->{subscripts.a}"
    spec_b = f"{subscripts.out},{subscripts.a}->{subscripts.b}"
    d_a = einsum(spec_a, cotangent, b)
    return d_a, weight_gradient(spec_b, cotangent, a, reduce_dtype)


_low_precision_einsum.defvjp(_forward, _backward)
