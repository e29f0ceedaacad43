"""Matrix products that accumulate in float32, forward and backward.

JAX's own transpose rule of a bfloat16 product with `preferred_element_type=float32` multiplies a float32
cotangent with a bfloat16 operand and accumulates in bfloat16. Here the cotangent is cast to the operand's
dtype, as PyTorch does, and both backward products accumulate in float32 again.
"""

import functools
import math
import operator
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llama_jax.numerics.backend import target_platform


def working_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of accumulation, norms, softmax, angles and losses: float64 for float64, else float32.

    This is what lets the whole model run in float64, where equality can be proved.
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def einsum(
    spec: str,
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    out_dtype: jnp.dtype | None = None,
    *,
    blocked: bool = True,
) -> Float[Array, "..."]:
    """`jnp.einsum(spec, a, b)` accumulated in float32 (float64 for float64), rounded once.

    Args:
        spec: an explicit two-operand specification with no index that one operand alone sums over.
        a, b: operands of one dtype.
        out_dtype: dtype of the result; None keeps the operands'.
        blocked: sum float32 on the CPU in blocks, which rounds less. A step of decoding does not: its time
            is that of reading `b`, and XLA would copy every block of it.
    """
    if a.dtype != b.dtype:
        raise ValueError(f"einsum: found {a.dtype} and {b.dtype}, expected operands of one dtype")
    out_dtype = jnp.dtype(out_dtype or a.dtype)
    if working_dtype(a.dtype) == a.dtype:
        # nothing to round: plain JAX, differentiable any number of times, forwards and backwards
        multiply = _blocked_einsum if blocked else _plain_einsum
        return multiply(spec, a, b).astype(out_dtype)
    return _low_precision_einsum(spec, out_dtype, a, b)


# XLA's float32 product on the CPU adds up long rows in one go; PyTorch's library there, in blocks of
# smaller depth, which rounds less: 1.5 times less at a depth of 576. So do we, in at most so many pieces. A
# few pieces more cost little; twice as many, twice the time. A single row (decoding) takes another path in
# XLA, which needs no help.
_DEPTH, _MOST_BLOCKS = 192, 32
_FINE_DEPTH, _MOST_FINE_BLOCKS = 144, 6


def _blocked_einsum(spec: str, a: Array, b: Array) -> Array:
    """`jnp.einsum`; for float32 on the CPU a sum over blocks of the contracted index."""
    inputs, out = spec.split("->")
    of_a, of_b = inputs.split(",")
    index, *others = [letter for letter in of_a if letter in of_b and letter not in out]
    axis_a, axis_b = of_a.index(index), of_b.index(index)
    depth = a.shape[axis_a]
    rows = math.prod(a.shape) // depth if depth else 0
    fine = min(-(-depth // _FINE_DEPTH), _MOST_FINE_BLOCKS)
    blocks = max(fine, min(-(-depth // _DEPTH), _MOST_BLOCKS))
    narrow = a.dtype != jnp.float32 or target_platform() != "cpu"
    if narrow or others or blocks < 2 or rows < 2:
        return _plain_einsum(spec, a, b)
    size = -(-depth // blocks)

    def piece(start: int) -> Array:
        end = min(start + size, depth)
        part_a = jax.lax.slice_in_dim(a, start, end, axis=axis_a)
        part_b = jax.lax.slice_in_dim(b, start, end, axis=axis_b)
        return _plain_einsum(spec, part_a, part_b)

    return functools.reduce(operator.add, map(piece, range(0, depth, size)))


def _plain_einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=a.dtype)


def wide_einsum(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """`jnp.einsum(spec, a, b)`, accumulated and returned in `dtype`; JAX's own derivative."""
    narrow = a.dtype in (jnp.bfloat16, jnp.float16)
    if narrow and target_platform() == "cpu":
        return _cpu_einsum(spec, a, b, dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


# XLA's CPU backend decides early which narrow products its library multiplies, widening the operands of the
# others, and folds transposes into products later. A product that it has kept narrow can then have a layout
# that the library does not know, and ends as "UNIMPLEMENTED: Unsupported element type for DotThunk". Hence
# the barriers: no transpose reaches the product through them.
def _cpu_einsum(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    inputs, out = spec.split("->")
    of_a, of_b = inputs.split(",")
    batch = [letter for letter in of_a if letter in of_b and letter in out]
    depths = [letter for letter in of_a if letter in of_b and letter not in out]
    if not batch:
        if len(depths) == 1:
            a, of_a = _depth_last(a, of_a, depths[0])
        # not `b`: a step of decoding would write the weights out before it multiplies with them
        a = jax.lax.optimization_barrier(a)
        return jnp.einsum(f"{of_a},{of_b}->{out}", a, b, preferred_element_type=dtype)

    of_rows = [letter for letter in of_a if letter not in of_b]
    of_columns = [letter for letter in of_b if letter not in of_a]
    to_a = "".join(batch + of_rows + depths)
    # both layouts of the second operand are fast: the one that is there
    rest = (of_columns, depths) if of_b[-1] in depths else (depths, of_columns)
    to_b = "".join([*batch, *rest[0], *rest[1]])
    first = jnp.transpose(a, [of_a.index(letter) for letter in to_a])
    second = jnp.transpose(b, [of_b.index(letter) for letter in to_b])
    first, second = jax.lax.optimization_barrier((first, second))
    in_a, in_b = ([of.index(letter) for letter in depths] for of in (to_a, to_b))
    leading = list(range(len(batch)))
    product = jax.lax.dot_general(
        first, second, ((in_a, in_b), (leading, leading)), preferred_element_type=dtype
    )
    product = jax.lax.optimization_barrier(product)
    to_out = "".join(batch + of_rows + of_columns)
    return jnp.transpose(product, [to_out.index(letter) for letter in out])


def _depth_last(a: Array, of_a: str, depth: str) -> tuple[Array, str]:
    """`a` with the contracted index last, and its letters.

    XLA's bfloat16 product on the CPU wants it there, and makes a float32 product, half as fast, of any
    other. XLA would fold a plain transpose into the product again; it does not where the index is cut in
    two on the way.
    """
    axis, size = of_a.index(depth), a.shape[of_a.index(depth)]
    if a.dtype != jnp.bfloat16 or axis == a.ndim - 1 or size % 2:
        return a, of_a
    halves = a.reshape(*a.shape[:axis], 2, size // 2, *a.shape[axis + 1 :])
    last = jnp.moveaxis(halves, (axis, axis + 1), (-2, -1))
    return last.reshape(*last.shape[:-2], size), of_a.replace(depth, "") + depth


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_precision_einsum(spec: str, out_dtype: jnp.dtype, a: Array, b: Array) -> Array:
    return wide_einsum(spec, a, b, jnp.dtype(jnp.float32)).astype(out_dtype)


def _forward(spec: str, out_dtype: jnp.dtype, a: Array, b: Array):
    return _low_precision_einsum(spec, out_dtype, a, b), (a, b)


def _backward(spec: str, out_dtype: jnp.dtype, operands: tuple[Array, Array], g: Array):
    a, b = operands
    inputs, out = spec.split("->")
    of_a, of_b = inputs.split(",")
    g = g.astype(a.dtype)
    return (
        _low_precision_einsum(f"{out},{of_b}->{of_a}", a.dtype, g, b),
        _low_precision_einsum(f"{out},{of_a}->{of_b}", b.dtype, g, a),
    )


_low_precision_einsum.defvjp(_forward, _backward)
