"""How a decoding step multiplies its few rows with a weight, where another way than XLA's matmul is faster.

Such a step waits for the weights. On a GPU XLA copies those of a layer out of the stacked array before it
multiplies with them; written as sums, it reads them in place, and once for all rows. On a CPU it widens
bfloat16 and integers in memory first; a kernel widens them in registers (extra `cpu`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.cpu.available import step_kernels
from llama_jax.numerics.matmul import working_dtype

_FEW_ROWS = 8
# Columns of a group. The sums of groups are added in order, which rounds more the smaller they are.
_LEAST_GROUP = 16

# codes, scale [out, groups] and zero, or None, of a matrix [out, in]
Codes = tuple[Array, Array, Array | None]


class InMemory(NamedTuple):
    """A weight that the kernel reads where it is.

    Attributes:
        widen: the matrix [out, in] that codes stand for, of which derivatives are taken.
        codes: int8 [out, groups, group], uint8 with two codes each [out, groups, group / 2], or the float32
            or bfloat16 weight itself.
    """

    widen: Callable[[Codes], Array]
    codes: Codes


def few_rows_matmul(
    x: Float[Array, "rows in"],
    weight: Float[Array, "out in"],
    out_dtype: jnp.dtype,
    *,
    is_head: bool = False,
) -> Float[Array, "rows out"] | None:
    """x weight^T, accumulated in float32 (float64 for float64) and rounded once; None for XLA's matmul.

    Args:
        x: operand of the same dtype as the weight.
        weight: of a layer or, with `is_head`, of the head, for which a GPU's matmul is the faster way.
        out_dtype: of the result.
        is_head: see `weight`.
    """
    if len(x) > _FEW_ROWS:
        return None
    if target_platform() == "gpu" and not is_head:
        return _sums(x, weight, out_dtype)
    in_memory = weight_in_memory(x, weight)
    return None if in_memory is None else multiply_in_memory(x, [in_memory])[0].astype(out_dtype)


def weight_in_memory(x: Float[Array, "rows in"], weight: Float[Array, "out in"]) -> InMemory | None:
    """A weight for `multiply_in_memory`; None where XLA's matmul is the way."""
    if weight.dtype != x.dtype or not _takes(x):
        return None
    return InMemory(_is_weight, (weight, jnp.ones((1, 1), jnp.float32), None))


def codes_in_memory(
    x: Float[Array, "rows in"], codes: Codes, widen: Callable[[Codes], Float[Array, "out in"]]
) -> InMemory | None:
    """A weight that is only codes for `multiply_in_memory`; None where it is to be widened before."""
    _, scale, _ = codes
    if not _takes(x) or x.shape[1] // scale.shape[1] < _LEAST_GROUP:
        return None
    return InMemory(widen, codes)


def multiply_in_memory(
    x: Float[Array, "rows in"], weights: Sequence[InMemory]
) -> tuple[Float[Array, "rows _"], ...]:
    """x weight^T for each of several weights, accumulated and returned in float32.

    Widened weights are not rounded to their dtype, so that in bfloat16 this is the more exact way.

    Args:
        x: in float32 or bfloat16.
        weights: of this x.
    """
    return _from_memory(tuple(w.widen for w in weights), x, tuple(w.codes for w in weights))


def _sums(x: Array, weight: Array, out_dtype: jnp.dtype) -> Array:
    working = working_dtype(x.dtype)
    wide = weight.astype(working)
    rows = jnp.split(x.astype(working), len(x))
    return jnp.stack([jnp.sum(wide * row, axis=-1) for row in rows]).astype(out_dtype)


def _takes(x: Array) -> bool:
    """Whether the kernel multiplies x."""
    if len(x) > _FEW_ROWS or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    return step_kernels() is not None


def _is_weight(codes: Codes) -> Array:
    """For a weight that is not in codes."""
    return codes[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _from_memory(
    widens: tuple[Callable[[Codes], Array], ...], x: Array, weights: tuple[Codes, ...]
) -> tuple[Array, ...]:
    """By the kernel, in float32."""
    kernels = step_kernels()
    assert kernels is not None, "see _takes"
    wide = []
    for codes, scale, zero in weights:
        scale = scale.astype(jnp.float32)
        wide.append((codes, scale, scale if zero is None else zero.astype(jnp.float32)))
    return tuple(kernels.multiply(x.astype(jnp.float32), wide))


@_from_memory.defjvp
def _from_memory_jvp(
    widens: tuple[Callable[[Codes], Array], ...],
    primals: tuple[Array, tuple[Codes, ...]],
    tangents: tuple[Array, Any],  # integers have none
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    def reference(x: Array, weights: tuple[Codes, ...]) -> tuple[Array, ...]:
        wide = [
            widen(codes).astype(jnp.float32) for widen, codes in zip(widens, weights, strict=True)
        ]
        return tuple(jnp.einsum("bi,oi->bo", x.astype(jnp.float32), weight) for weight in wide)

    return _from_memory(widens, *primals), jax.jvp(reference, primals, tangents)[1]
