"""The kernel of many rows as a function of arrays; to import it loads or compiles it."""

import ctypes
import platform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax.numerics.cpu import processor
from llama_jax.numerics.cpu.layout import A_FIRST, B_LAST
from llama_jax.numerics.cpu.object_code import register_kernel

_TARGET = "llama_jax_tiled_matmul"
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64

register_kernel("tiled", _TARGET)


def _may_use_amx() -> bool:
    """Whether the processor has bfloat16 in AMX, and Linux lets this process use it."""
    if platform.system() != "Linux" or not processor.HAS_AMX:
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
    layout = A_FIRST * a_first + B_LAST * b_last
    out: Array = jax.ffi.ffi_call(_TARGET, result)(a, b, layout=np.int64(layout))
    return out
