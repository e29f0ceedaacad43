"""The kernel of attention's gradients as a function of arrays; to import it loads or compiles it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from llama_jax.numerics.cpu.object_code import register_kernel

_TARGET = "llama_jax_flash_backward"
register_kernel("flash_backward", _TARGET)


def gradients(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    query_slots: Int32[Array, " q"],
    key_slots: Int32[Array, " k"],
    query_segments: Int32[Array, "batch q"],
    key_segments: Int32[Array, "batch k"],
    visible_until: Int32[Array, "batch k"],
    row_max: Float[Array, "batch q heads 1"],
    row_sum: Float[Array, "batch q heads 1"],
    delta: Float[Array, "batch q heads 1"],
    d_out: Float[Array, "batch q heads dim"],
) -> list[Array]:
    """The gradients of query, key and value, of `flash_call.attend`, in their shapes.

    Args:
        row_max, row_sum: of the forward pass.
        delta: the sum of the output times its gradient, of each row.
        d_out: the gradient of the output; all arrays are float32.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (query, key, value)]
    integers = query_slots, key_slots, query_segments, key_segments, visible_until
    call = jax.ffi.ffi_call(_TARGET, shapes, vmap_method="sequential")
    return list(call(query, key, value, *integers, row_max, row_sum, delta, d_out))
