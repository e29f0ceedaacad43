"""cuDNN's fused attention, for NVIDIA GPUs."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.attention.masks import AttentionMask
from llama_jax.numerics.backend import gpu_capability


def cudnn_attention(
    query: Float[Array, "batch q heads dim"],
    key: Float[Array, "batch k kv_heads dim"],
    value: Float[Array, "batch k kv_heads dim"],
    mask: AttentionMask,
) -> Float[Array, "batch q heads dim"]:
    """Causal attention by `jax.nn.dot_product_attention`; only where `why_not_cudnn` returns None."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def why_not_cudnn(query: Any, mask: AttentionMask, sequence_shards: int) -> str | None:
    """Why cuDNN cannot do this, or None: it does full causal sequences in half precision."""
    dim = query.shape[3]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype}, expected bfloat16 or float16"
    if dim % 8 or dim > 128:  # 256 from Hopper on, but the GPU is not known here
        return f"head_dim {dim}, expected a multiple of 8 up to 128"
    if sequence_shards > 1 or mask.query_slots is not None or mask.order is not None:
        return "a part of the sequence, expected the full sequence"
    if (reason := why_not_ampere()) is not None:
        return reason
    if mask.key_is_token is not None or mask.query_segments is not None:
        return "padding or segments, expected neither: cuDNN takes them only as a [q, k] bias"
    return None


def why_not_ampere() -> str | None:
    """Why the GPUs cannot run kernels for Ampere and later, or None; those that are not here can."""
    capability = gpu_capability()
    if capability is None:
        return None
    if re.fullmatch(r"\d+\.\d", capability) is None:  # AMD's are names, such as gfx942
        return f"a GPU {capability}, expected one of NVIDIA"
    if float(capability) < 8:
        return f"a GPU of compute capability {capability}, expected 8.0 or later"
    return None
