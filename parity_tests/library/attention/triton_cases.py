"""Masks and operands for the tests of the Triton kernels, and their error against float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.attention.masks import AttentionMask, dense_mask
from llama_jax.attention.plain import dot_product_attention
from llama_jax.attention.triton import triton_attention
from llama_jax.attention.triton.blocks import Blocks, Kernels
from parity_tests.harness.compilation import FAST_COMPILE

BATCH = 2
# blocks of another size in each kernel, none of them square
SMALL = Kernels(Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), interpret=True)
KINDS = ("causal", "left", "right", "nothing", "packed", "scattered", "left packed right")


def mask_of(kind: str, seq: int, batch: int = BATCH) -> AttentionMask:
    """Every kind but "causal" has padding and documents, if only one: one program serves them all."""
    if kind == "causal":
        return AttentionMask()
    rng = np.random.default_rng(1)
    is_token = np.ones((batch, seq), bool)
    segments = np.zeros((batch, seq), np.int32)
    if "left" in kind:
        is_token[0, : seq // 3] = False
    if "right" in kind:
        is_token[1, seq - seq // 3 :] = False
    if "nothing" in kind:
        is_token[0] = False
    if "packed" in kind:
        segments = np.sort(rng.integers(0, 4, (batch, seq)), axis=1)
    if "scattered" in kind:  # a segment that continues after another one
        segments = rng.integers(0, 3, (batch, seq))
    ids = jnp.asarray(segments, jnp.int32)
    return AttentionMask(None, None, jnp.asarray(is_token), ids, ids)


def operands(
    q: int, k: int, heads: int, kv_heads: int, dim: int, dtype: Any, batch: int = BATCH
) -> list[jax.Array]:
    """Query, key, value and the gradient of the output."""
    rng = np.random.default_rng(q)
    return [
        jnp.asarray(rng.normal(size=(batch, seq, count, dim)), jnp.float32).astype(dtype)
        for seq, count in ((q, heads), (k, kv_heads), (k, kv_heads), (q, heads))
    ]


# what takes the time is the compiler
_jit = partial(jax.jit, compiler_options=FAST_COMPILE)


@partial(_jit, static_argnums=2)
def fused(
    arrays: list[jax.Array], mask: AttentionMask, kernels: Kernels = SMALL
) -> list[jax.Array]:
    """Output and the three gradients of the kernels, run as plain JAX."""
    *inputs, gradient = arrays
    out, pull = jax.vjp(lambda *a: triton_attention(*a, mask, kernels), *inputs)
    return [out, *pull(gradient)]


@_jit
def plain(arrays: list[jax.Array], mask: AttentionMask) -> list[jax.Array]:
    """Those of the plain formula."""
    *inputs, gradient = arrays
    dense = dense_mask(mask, inputs[0].shape[1], inputs[1].shape[1])
    out, pull = jax.vjp(lambda *a: dot_product_attention(*a, dense)[0], *inputs)
    return [out, *pull(gradient)]


def errors(arrays: list[jax.Array], mask: AttentionMask, results: list[jax.Array]) -> list[float]:
    """The rms error of output and gradients against float64."""
    with jax.enable_x64():
        exact = plain([array.astype(jnp.float64) for array in arrays], mask)
        pairs = zip(results, exact, strict=True)
        return [float(jnp.sqrt(jnp.mean((a.astype(jnp.float64) - e) ** 2))) for a, e in pairs]
