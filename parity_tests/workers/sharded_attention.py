"""Attention on eight host devices against one. Run by `test_attention_sharded.py`; prints JSON lines."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from parity_tests.reference.errors import relative_error

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

BATCH, SEQ, DIM = 8, 20, 4
# axes of the mesh, heads, kv heads
CASES = {
    "data8": ({"data": 8}, 4, 2),
    "tensor4": ({"tensor": 4}, 8, 4),
    "tensor4-kv2": ({"tensor": 4}, 8, 2),
    "tensor4-heads6": ({"tensor": 4}, 6, 2),  # not divisible: every shard computes all heads
    "sequence4": ({"sequence": 4}, 4, 2),
    "fsdp2-sequence2-tensor2": ({"fsdp": 2, "sequence": 2, "tensor": 2}, 4, 2),
}


def masks():
    rng = np.random.default_rng(0)
    is_token = jnp.asarray(rng.random((BATCH, SEQ)) < 0.8)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (BATCH, SEQ)), axis=1), jnp.int32)
    yield "causal", AttentionMask()
    yield "packed", AttentionMask(None, None, is_token, segments, segments)


def step(operands, mask, implementation):
    out = attention(*operands, mask, implementation=implementation)[0]
    return jnp.sum(out * jnp.linspace(-1, 2, out.size).reshape(out.shape)), out


def run(operands, mask, implementation):
    """The output and the three gradients."""
    compiled = jax.jit(jax.value_and_grad(step, has_aux=True), static_argnums=2)
    (_, out), gradients = compiled(operands, mask, implementation)
    return [out, *gradients]


def main() -> None:
    for name, (sizes, heads, kv_heads) in CASES.items():
        rng = np.random.default_rng(1)
        shapes = [(BATCH, SEQ, count, DIM) for count in (heads, kv_heads, kv_heads)]
        operands = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
        for kind, mask in masks():
            want = run(operands, mask, "plain")
            with jax.set_mesh(mesh):
                got = run(operands, mask, "blocked")
            pairs = zip(got, want, strict=True)
            errors = [relative_error(np.asarray(a), np.asarray(b)) for a, b in pairs]
            print(json.dumps({"case": f"{name}-{kind}", "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
