"""The kernel of many rows as a function of arrays; to import it compiles it, or reads numba's cache."""

import ctypes
import platform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.numerics.cpu import tiles
from llama_jax.numerics.cpu.tiled import HANDLERS

_TARGET = "llama_jax_tiled_matmul"
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64

for _layout, _handler in enumerate(HANDLERS):
    jax.ffi.register_ffi_target(
        f"{_TARGET}_{_layout}", jax.ffi.pycapsule(_handler.ctypes), platform="cpu"
    )


def _may_use_amx() -> bool:
    """Whether the processor has bfloat16 in AMX, and Linux lets this process use it."""
    if platform.system() != "Linux" or not tiles.HAS_AMX:
        return False
    return not ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)


HAS_AMX = _may_use_amx()


def multiply(
    a: Float[Array, "batch rows inner"],
    b: Float[Array, "batch inner columns"],
    out_dtype: jnp.dtype,
    *,
    a_first: bool = False,
    b_last: bool = False,
) -> Float[Array, "batch rows columns"]:
    """a b, both of float32 or bfloat16, summed up in float32.

    Sizes are multiples: rows of 4, columns of 32 and inner of 16 in float32, all of 32 in bfloat16, which
    needs `HAS_AMX`.

    Args:
        out_dtype: of the result: float32 or, of operands in bfloat16, also bfloat16.
        a_first: `a` is [batch, inner, rows].
        b_last: `b` is [batch, columns, inner].
    """
    shape = a.shape[0], a.shape[2 if a_first else 1], b.shape[1 if b_last else 2]
    result = jax.ShapeDtypeStruct(shape, out_dtype)
    out: Array = jax.ffi.ffi_call(f"{_TARGET}_{a_first + 2 * b_last}", result)(a, b)
    return out
