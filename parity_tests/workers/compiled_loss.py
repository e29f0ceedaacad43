"""The fused loss compiled for GPUs or TPUs that nobody here has. Prints one JSON object.

python -m parity_tests.workers.compiled_loss TOPOLOGY TOKENS HIDDEN VOCAB
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_jax.loss import fused_linear_cross_entropy
from train.hardware.flops import matmul_flops
from train.hardware.hlo import operands, parse
from train.hardware.topology import topology_devices


def main(topology: str, tokens: int, hidden: int, vocab: int) -> None:
    devices = topology_devices(topology)
    mesh = jax.make_mesh((len(devices),), ("fsdp",), (AxisType.Auto,), devices=devices)

    def array(shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(hidden, kernel, labels):
        return fused_linear_cross_entropy(hidden, kernel, labels, vocab_axis=0).loss

    arguments = (
        array((tokens, hidden), jnp.bfloat16, "fsdp"),
        array((vocab, hidden), jnp.bfloat16, None, "fsdp"),
        array((tokens,), jnp.int32, "fsdp"),
    )
    gradients = tuple(argument.sharding for argument in arguments[:2])
    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(replicated, gradients))
    with jax.set_mesh(mesh):
        traced = step.trace(*arguments)
        compiled = traced.lower().compile()
    text = compiled.as_text()
    print(
        json.dumps(
            {
                "peak": compiled.memory_analysis().peak_memory_in_bytes,
                "units": matmul_flops(traced.jaxpr.jaxpr) / (2 * tokens * hidden * vocab),
                "loop": loop_body(text),
                "types": sorted(set(re.findall(r"\w+\[[\d,]+\]", text))),
                "collectives": re.findall(
                    r"= (.*?) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text
                ),
            }
        )
    )


def loop_body(text: str) -> list[tuple[str, str, list[str]]]:
    """Type, operation and the types of the operands, of each instruction in the body of the only loop."""
    program = parse(text)
    (body,) = set(re.findall(r"body=%?([\w.\-]+)", text))
    instructions = program[body].instructions
    types = {instruction.name: instruction.type for instruction in instructions}
    return [
        (instruction.type, instruction.opcode, [types[name] for name in operands(instruction)])
        for instruction in instructions
    ]


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
