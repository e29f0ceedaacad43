"""Compile Splash attention and a model for a TPU without having one. Run by `test_attention_tpu.py`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax import LlamaConfig, LlamaForCausalLM
from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from llama_jax.attention.zigzag import ZigZag
from train.hardware.collectives import by_kind
from train.hardware.topology import topology_devices
from train.hardware.transfers import transfers

# sizes of data, sequence and tensor; batch, seq, heads, kv heads, dim; packed; with a sequence axis, in
# zig-zag order
CASES = {
    "data4-dim64": ((4, 1, 1), (4, 1024, 8, 4, 64), jnp.bfloat16, False),
    "data2-tensor2-packed": ((2, 1, 2), (4, 1024, 8, 4, 128), jnp.bfloat16, True),
    "sequence4-packed": ((1, 4, 1), (2, 2048, 8, 4, 64), jnp.bfloat16, True),
    "sequence2-tensor2-float32": ((1, 2, 2), (2, 1024, 8, 4, 64), jnp.float32, False),
    "tensor4-kv2-dim80": ((1, 1, 4), (2, 640, 8, 2, 80), jnp.bfloat16, False),
    "tensor4-heads6": ((1, 1, 4), (2, 640, 6, 2, 96), jnp.bfloat16, False),
}


def compiled(mesh, function, *arguments) -> str:
    """The program, as text."""
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), arguments
    )
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


def summary(text) -> dict:
    """The number of kernel calls, and bytes that are sent of each kind of collective."""
    found = by_kind(transfers(text)).values()
    return {
        "kernels": text.count("tpu_custom_call"),
        "sent": {collective.kind: collective.sent for collective in found},
    }


def main() -> None:
    devices = topology_devices("v5p:2x2x1")

    def mesh_of(sizes):
        axes = ("data", "sequence", "tensor")
        return Mesh(np.array(devices).reshape(sizes), axes, axis_types=(AxisType.Auto,) * 3)

    for name, (sizes, (batch, seq, heads, kv_heads, dim), dtype, packed) in CASES.items():
        shards = sizes[1]
        order = ZigZag.of(seq, shards) if shards > 1 else None

        def energy(operands, is_token, segments, packed=packed, order=order):
            mask = AttentionMask(None, None, is_token, segments, segments)
            mask = (mask if packed else AttentionMask())._replace(order=order)
            out, _ = attention(*operands, mask, implementation="splash")
            return out.astype(jnp.float32).sum()

        operands = [
            jax.ShapeDtypeStruct((batch, seq, count, dim), dtype)
            for count in (heads, kv_heads, kv_heads)
        ]
        per_token = [jax.ShapeDtypeStruct((batch, seq), kind) for kind in (bool, jnp.int32)]
        text = compiled(mesh_of(sizes), jax.grad(energy), operands, *per_token)
        print(json.dumps({"case": name} | summary(text)), flush=True)

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = nnx.eval_shape(lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def loss(model, ids):
        return model(ids, labels=ids, attention_implementation="splash").loss

    text = compiled(mesh_of((2, 1, 2)), jax.grad(loss), model, ids)
    print(json.dumps({"case": "model"} | summary(text)), flush=True)


if __name__ == "__main__":
    main()
