"""How a decoding step multiplies its few rows with a weight, where another way than XLA's matmul is faster.

Such a step waits for the weights. On a GPU XLA copies those of a layer out of the stacked array before it
multiplies with them; written as sums, it reads them in place, and once for all rows. On a CPU it widens
bfloat16 and integers in memory first; a kernel widens them in registers (extra `cpu`).
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.matmul import working_dtype

_FEW_ROWS = 8
# Columns of a group. The sums of groups are added in order, which rounds more the smaller they are.
_LEAST_GROUP = 16

# codes, scale [out, groups] and zero, or None, of a matrix [out, in]
Codes = tuple[Array, Array, Array | None]


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
    if weight.dtype == x.dtype and _takes(x):
        scale = jnp.ones((1, 1), jnp.float32)
        return _from_memory(_is_weight, x, (weight, scale, None)).astype(out_dtype)
    return None


def few_rows_from_codes(
    x: Float[Array, "rows in"],
    codes: Codes,
    widen: Callable[[Codes], Float[Array, "out in"]],
    out_dtype: jnp.dtype,
) -> Float[Array, "rows out"] | None:
    """x weight^T of a weight that is only codes; None where it is to be widened before.

    The widened weight is not rounded to its dtype, so that in bfloat16 this is the more exact way.

    Args:
        x: in float32 or bfloat16.
        codes: int8 [out, groups, group], or uint8 with two codes each [out, groups, group / 2].
        widen: the matrix that the codes stand for, of which derivatives are taken.
        out_dtype: of the result.
    """
    _, scale, _ = codes
    if not _takes(x) or x.shape[1] // scale.shape[1] < _LEAST_GROUP:
        return None
    return _from_memory(widen, x, codes).astype(out_dtype)


def _sums(x: Array, weight: Array, out_dtype: jnp.dtype) -> Array:
    working = working_dtype(x.dtype)
    wide = weight.astype(working)
    rows = jnp.split(x.astype(working), len(x))
    return jnp.stack([jnp.sum(wide * row, axis=-1) for row in rows]).astype(out_dtype)


def _takes(x: Array) -> bool:
    """Whether the kernel multiplies x: numba is installed, and this program is for one CPU."""
    if len(x) > _FEW_ROWS or x.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    is_one = jax.sharding.get_abstract_mesh().empty
    return is_one and target_platform() == "cpu" and _kernel() is not None


@cache
def _kernel() -> Callable[..., Array] | None:
    """`multiply`, which takes seconds to compile where numba has no cache of it; None without numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from llama_jax.numerics.cpu.call import multiply
    except (ImportError, OSError, RuntimeError) as error:
        # no numba for this numpy, or nowhere to keep what it compiles
        warnings.warn(f"decoding is slower than it could be: numba: {error}", stacklevel=2)
        return None
    return multiply


def _is_weight(codes: Codes) -> Array:
    """For a weight that is not in codes."""
    return codes[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _from_memory(
    widen: Callable[[Codes], Array], x: Float[Array, "rows in"], codes: Codes
) -> Float[Array, "rows out"]:
    """By the kernel, in float32."""
    multiply = _kernel()
    assert multiply is not None, "see _takes"
    values, scale, zero = codes
    scale = scale.astype(jnp.float32)
    zero = scale if zero is None else zero.astype(jnp.float32)
    return multiply(x.astype(jnp.float32), values, scale, zero)


@_from_memory.defjvp
def _from_memory_jvp(
    widen: Callable[[Codes], Array],
    primals: tuple[Array, Codes],
    tangents: tuple[Array, Any],  # integers have none
) -> tuple[Array, Array]:
    def reference(x: Array, codes: Codes) -> Array:
        return jnp.einsum("bi,oi->bo", *(of.astype(jnp.float32) for of in (x, widen(codes))))

    return _from_memory(widen, *primals), jax.jvp(reference, primals, tangents)[1]
