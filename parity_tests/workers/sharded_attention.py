"""Attention on eight host devices against one. Run by `test_attention_sharded.py`; prints JSON lines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.zigzag import ZigZag
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error

use_host_devices(8)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

BATCH, SEQ, DIM = 8, 24, 4
# axes of the mesh, heads, kv heads
CASES = {
    "data8": ({"data": 8}, 4, 2),
    "tensor4": ({"tensor": 4}, 8, 4),
    "tensor4-kv2": ({"tensor": 4}, 8, 2),
    "tensor4-heads6": ({"tensor": 4}, 6, 2),  # not divisible: every shard computes all heads
    "sequence4": ({"sequence": 4}, 4, 2),
    "fsdp2-sequence2-tensor2": ({"fsdp": 2, "sequence": 2, "tensor": 2}, 4, 2),
}
# of the tokens over a mesh with a sequence axis; the last is for another number of shards
ORDERS = {
    "zigzag": lambda shards: ZigZag.of(SEQ, shards),
    "zigzag-chunk1": lambda shards: ZigZag(shards, chunk=1),
    "zigzag-6-shards": lambda shards: ZigZag(6, chunk=2),
}


def masks():
    rng = np.random.default_rng(0)
    is_token = jnp.asarray(rng.random((BATCH, SEQ)) < 0.8)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (BATCH, SEQ)), axis=1), jnp.int32)
    yield "causal", AttentionMask()
    yield "packed", AttentionMask(None, None, is_token, segments, segments)


def in_order(order, mask):
    """A mask of the row's own order in that of `order`."""
    slots = order.slots(SEQ)
    return jax.tree.map(lambda array: array[:, slots], mask)._replace(order=order)


def step(operands, mask, implementation):
    out = attention(*operands, mask, implementation=implementation)[0]
    # a cotangent that depends on the token, in whatever order
    cotangent = jnp.linspace(-1, 2, out.size).reshape(out.shape)
    if mask.order is not None:
        cotangent = cotangent[:, mask.order.slots(SEQ)]
    return jnp.sum(out * cotangent), out


def run(operands, mask, implementation):
    """The output and the three gradients."""
    compiled = jax.jit(jax.value_and_grad(step, has_aux=True), static_argnums=2)
    (_, out), gradients = compiled(operands, mask, implementation)
    return [*map(np.asarray, (out, *gradients))]


def main() -> None:
    for name, (sizes, heads, kv_heads) in CASES.items():
        rng = np.random.default_rng(1)
        shapes = [(BATCH, SEQ, count, DIM) for count in (heads, kv_heads, kv_heads)]
        operands = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
        for kind, mask in masks():
            want = run(operands, mask, "plain")

            def compare(case, got, want=want):
                pairs = zip(got, want, strict=True)
                errors = [relative_error(np.asarray(a), np.asarray(b)) for a, b in pairs]
                print(json.dumps({"case": case, "errors": errors}), flush=True)

            with jax.set_mesh(mesh):
                compare(f"{name}-{kind}", run(operands, mask, "blocked"))
            for order_name, order_of in ORDERS.items() if "sequence" in sizes else ():
                order = order_of(sizes["sequence"])
                slots = order.slots(SEQ)
                permuted = [array[:, slots] for array in operands]
                for implementation in ("blocked", "plain")[: 1 + (order_name == "zigzag")]:
                    with jax.set_mesh(mesh):
                        got = run(permuted, in_order(order, mask), implementation)
                    restored = [array[:, np.argsort(slots)] for array in got]
                    compare(f"{name}-{kind}-{order_name}-{implementation}", restored)


if __name__ == "__main__":
    main()
