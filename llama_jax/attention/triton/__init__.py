"""FlashAttention over packed rows as Pallas kernels for NVIDIA GPUs, compiled by Triton.

`attention` calls the kernels and differentiates them, `kernels` has their bodies, `ranges` the blocks that
they visit, `blocks` how large these are.
"""

from llama_jax.attention.triton.attention import triton_attention, why_not_triton

__all__ = ["triton_attention", "why_not_triton"]
