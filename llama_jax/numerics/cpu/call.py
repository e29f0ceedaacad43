"""The kernel as a function of arrays; to import it compiles it, or reads it from numba's cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.numerics.cpu.kernel import handler

_TARGET = "llama_jax_few_rows"

jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler.ctypes), platform="cpu")


def multiply(
    x: Float[Array, "rows in"],
    codes: Array,
    scale: Float[Array, "out groups"],
    zero: Float[Array, "out groups"],
) -> Float[Array, "rows out"]:
    """x weight^T in float32, of a weight in memory as `codes`.

    Args:
        x: float32.
        codes: float32, bfloat16 or int8 [out, in], int8 [out, groups, group], or uint8 with two codes each
            [out, groups, group / 2]: low bits for the first half of a group, each 8 more than the code.
        scale: of the codes, float32; not read for float32 and bfloat16.
        zero: is added to code * scale, float32; read for uint8 only.
    """
    shape = jax.ShapeDtypeStruct((len(x), len(codes)), jnp.float32)
    out: Array = jax.ffi.ffi_call(_TARGET, shape, vmap_method="sequential")(x, codes, scale, zero)
    return out
