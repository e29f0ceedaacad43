"""The kernels of few rows as functions of arrays; to import them loads or compiles them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llama_jax.numerics.cpu import seats  # noqa: F401 - its symbol
from llama_jax.numerics.cpu.object_code import register_kernel

_MULTIPLY, _ATTEND = "llama_jax_few_rows", "llama_jax_one_query"

register_kernel("kernel", _MULTIPLY, _ATTEND)


def multiply(
    x: Float[Array, "rows in"], weights: Sequence[tuple[Array, Array, Array]]
) -> list[Float[Array, "rows _"]]:
    """x weight^T in float32 for each of several weights, which stay in memory as codes.

    Args:
        x: float32.
        weights: codes, scale and zero of each.
            Codes: float32, bfloat16 or int8 [out, in], int8 [out, groups, group], or uint8 with two
            codes each [out, groups, group / 2]: low bits for the first half of a group, each 8 more than
            the code.
            Scale: of the codes, float32 [out, groups]; not read for float32 and bfloat16.
            Zero: is added to code * scale, float32 [out, groups]; read for uint8 only.
    """
    shapes = [jax.ShapeDtypeStruct((len(x), len(codes)), jnp.float32) for codes, _, _ in weights]
    operands = [array for weight in weights for array in weight]
    outs = jax.ffi.ffi_call(_MULTIPLY, shapes, vmap_method="sequential")(x, *operands)
    return list(outs)


def attend(
    query: Float[Array, "rows heads dim"],
    keys: Float[Array, "rows*kv_heads capacity dim"],
    values: Float[Array, "rows*kv_heads capacity dim"],
    visible: Bool[Array, "rows capacity"],
) -> Float[Array, "rows heads dim"]:
    """softmax(query keys^T / sqrt(dim)) values in float32, over the visible keys; zeros without any.

    Args:
        query: float32.
        keys, values: both float32 or both bfloat16.
        visible: which keys the query sees.
    """
    shape = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    call = jax.ffi.ffi_call(_ATTEND, shape, vmap_method="sequential")
    out: Array = call(query, keys, values, visible)
    return out
