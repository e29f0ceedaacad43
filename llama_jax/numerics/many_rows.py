"""Matmuls of many rows on a CPU by a kernel of our own, where it is faster than XLA's (extra `cpu`).

XLA's float32 matmul sums up long rows in one pass, so that ours has to be a loop over blocks, which costs
time; the kernel sums up blocks in registers. In bfloat16 it uses AMX whatever the layout of the operands;
XLA writes another layout to memory first.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.cpu.available import tiled_kernel

# Smaller matmuls are XLA's: a call of the kernel costs more than it saves.
_LEAST_PRODUCTS = 1 << 22
_LEAST_ROWS = 32


class _Form(NamedTuple):
    """An einsum specification as a matmul [batch, rows, inner] x [batch, inner, columns].

    swapped: the second operand of the einsum is the first of the matmul.
    a_first, b_last: where the first or second operand of the matmul has the contracted indices.
    """

    batch: str
    rows: str
    columns: str
    inner: str
    swapped: bool
    a_first: bool
    b_last: bool


@cache
def _form(spec: str) -> _Form | None:
    """None for a specification that is a matmul only after a transpose."""
    operands, out = spec.split("->")
    a, b = operands.split(",")
    batch = "".join(index for index in out if index in a and index in b)
    inner = "".join(index for index in a if index in b and index not in out)
    for swapped, (first, second) in enumerate(((a, b), (b, a))):
        rows = "".join(index for index in out if index not in second)
        columns = "".join(index for index in out if index not in first)
        layouts_a = batch + rows + inner, batch + inner + rows
        layouts_b = batch + inner + columns, batch + columns + inner
        if out == batch + rows + columns and first in layouts_a and second in layouts_b:
            places = layouts_a.index(first) == 1, layouts_b.index(second) == 1
            return _Form(batch, rows, columns, inner, bool(swapped), *places)
    return None


def _sizes(form: _Form, spec: str, *shapes: tuple[int, ...]) -> list[int]:
    """Of batch, rows, columns and inner."""
    operands = spec.split("->")[0].split(",")
    size = {
        i: n
        for of, shape in zip(operands, shapes, strict=True)
        for i, n in zip(of, shape, strict=True)
    }
    return [math.prod(size[index] for index in part) for part in form[:4]]


def takes_many_rows(spec: str, a: Array, b: Array) -> bool:
    """Whether `many_rows_matmul` computes this einsum: its form, its sizes and the processor suit it."""
    if a.dtype != b.dtype or a.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    form, mesh = _form(spec), jax.sharding.get_abstract_mesh()
    if form is None or target_platform() != "cpu" or not (mesh.empty or mesh.size == 1):
        return False
    batch, rows, columns, inner = _sizes(form, spec, a.shape, b.shape)
    if min(rows, columns) < _LEAST_ROWS or batch * rows * columns * inner < _LEAST_PRODUCTS:
        return False
    units = (4, 32, 16) if a.dtype == jnp.float32 else (32, 32, 32)
    if any(size % unit for size, unit in zip((rows, columns, inner), units, strict=True)):
        return False
    kernel = tiled_kernel()
    return kernel is not None and (a.dtype == jnp.float32 or kernel.HAS_AMX)


def many_rows_matmul(spec: str, out_dtype: jnp.dtype, a: Array, b: Array) -> Array:
    """`jnp.einsum(spec, a, b)` that `takes_many_rows`, accumulated in float32 and rounded once.

    Its derivatives are those of the einsum.

    Args:
        out_dtype: float32 or that of the operands.
    """
    operands = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, b))
    jaxpr = _plain.trace(spec, out_dtype, *operands).jaxpr
    out: Array = _many_rows_matmul.bind(a, b, spec=spec, jaxpr=jaxpr)
    return out


@partial(jax.jit, static_argnums=(0, 1))
def _plain(spec: str, out_dtype: jnp.dtype, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(out_dtype)


# A primitive, for derivatives and batches. What it computes is a parameter for those who look for matmuls
# in a program.
_many_rows_matmul = Primitive("many_rows_matmul")


@_many_rows_matmul.def_impl
def _run(a: Array, b: Array, *, spec: str, jaxpr: ClosedJaxpr) -> Array:
    form, kernel = _form(spec), tiled_kernel()
    assert form is not None, "see takes_many_rows"
    assert kernel is not None, "see takes_many_rows"
    batch, rows, columns, inner = _sizes(form, spec, a.shape, b.shape)
    if form.swapped:
        a, b = b, a
    a = a.reshape(batch, *((inner, rows) if form.a_first else (rows, inner)))
    b = b.reshape(batch, *((columns, inner) if form.b_last else (inner, columns)))
    result = jaxpr.out_avals[0]
    out: Array = kernel.multiply(a, b, result.dtype, a_first=form.a_first, b_last=form.b_last)
    return out.reshape(result.shape)


@_many_rows_matmul.def_abstract_eval
def _result(a: Any, b: Any, *, spec: str, jaxpr: ClosedJaxpr) -> Any:
    del a, b, spec
    return jaxpr.out_avals[0]


def _transpose_in_a(cotangent: Array, a: Any, b: Array, *, spec: str, jaxpr: ClosedJaxpr) -> Array:
    plain = partial(_plain, spec, jaxpr.out_avals[0].dtype)
    like = jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype)
    (gradient,) = jax.linear_transpose(lambda a: plain(a, b), like)(cotangent)
    return gradient


def _transpose_in_b(cotangent: Array, a: Array, b: Any, *, spec: str, jaxpr: ClosedJaxpr) -> Array:
    plain = partial(_plain, spec, jaxpr.out_avals[0].dtype)
    like = jax.ShapeDtypeStruct(b.aval.shape, b.aval.dtype)
    (gradient,) = jax.linear_transpose(lambda b: plain(a, b), like)(cotangent)
    return gradient


def _batch(operands: Any, axes: Any, *, spec: str, jaxpr: ClosedJaxpr) -> tuple[Array, int]:
    plain = partial(_plain, spec, jaxpr.out_avals[0].dtype)
    return jax.vmap(plain, axes)(*operands), 0


ad.defbilinear(_many_rows_matmul, _transpose_in_a, _transpose_in_b)
batching.primitive_batchers[_many_rows_matmul] = _batch
mlir.register_lowering(
    _many_rows_matmul, mlir.lower_fun(_run, multiple_results=False), platform="cpu"
)
