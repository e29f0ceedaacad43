"""The kernel of many queries as a function of arrays; to import it loads or compiles it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from llama_jax.numerics.cpu.object_code import register_kernel

_TARGET = "llama_jax_flash_attention"
register_kernel("flash", _TARGET)


def attend(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    query_slots: Int32[Array, " q"],
    key_slots: Int32[Array, " k"],
    query_segments: Int32[Array, "batch q"],
    key_segments: Int32[Array, "batch k"],
    visible_until: Int32[Array, "batch k"],
) -> list[Array]:
    """softmax(query key^T / sqrt(dim)) value in float32, over the visible keys; zeros without any.

    A query sees the keys of its segment whose slot is not after its own, which is not after their
    `visible_until`.

    Args:
        query, key, value: float32; dim is a multiple of 32.

    Returns:
        It, and the maximum and sum of exponentials of each row, float32 [batch, q, heads, 1].
    """
    of_rows = jax.ShapeDtypeStruct((*query.shape[:3], 1), jnp.float32)
    shapes = jax.ShapeDtypeStruct(query.shape, jnp.float32), of_rows, of_rows
    operands = query_slots, key_slots, query_segments, key_segments, visible_until
    call = jax.ffi.ffi_call(_TARGET, shapes, vmap_method="sequential")
    return list(call(query, key, value, *operands))
