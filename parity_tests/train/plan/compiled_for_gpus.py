"""Run by `test_gpu_plan.py`: compiles a step for GPUs and prints, as JSON, what attention is in it.

Arguments: a topology, then flags of `plan`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax

from train.flags import parse_options
from train.hardware.hlo import Instruction, operands, parse
from train.hardware.topology import topology_devices
from train.model.config import model_config
from train.options import PLANNED, with_defaults
from train.program.build import run_program

KERNELS = ("attention_forward", "attention_d_query", "attention_d_key_value")


def shape_of(instruction: Instruction) -> tuple[int, ...]:
    """Of an array; () of tuples."""
    match = re.match(r"[a-z]\w*\[([\d,]+)\]", instruction.type)
    return () if match is None else tuple(map(int, match[1].split(",")))


def facts(topology: str, flags: list[str]) -> dict:
    devices = topology_devices(topology)
    options = with_defaults(parse_options(PLANNED, flags, Path("test")), "gpu")
    config = model_config(options.model, None, options.sequence_length)
    program = run_program(options, config, devices)
    with jax.set_mesh(program.mesh):
        arguments = program.params, program.opt_state, program.batch, None
        compiled = program.step.trace(*arguments).lower().compile()
    seq, dim = options.sequence_length, config.head_size
    # keys as they are repeated, before their heads are flattened
    by_group = config.kv_heads, config.num_attention_heads // config.kv_heads, dim
    calls: Counter[str] = Counter()
    keys_read, scores, repeated = [], [], []
    for computation in parse(compiled.as_text()).values():
        shapes = {each.name: shape_of(each) for each in computation.instructions}
        # what a fusion computes on the way is in no memory
        if "fused" not in computation.name:
            scores += [name for name, shape in shapes.items() if shape.count(seq) > 1]
            repeated += [name for name, shape in shapes.items() if shape[-3:] == by_group]
        for each in computation.instructions:
            kernel = next((name for name in KERNELS if f'name = "{name}"' in each.rest), None)
            if each.opcode == "custom-call" and kernel is not None:
                calls[kernel] += 1
                read = [shapes[name] for name in operands(each)]
                keys_read.append(sum(shape[-2:] == (config.kv_heads, dim) for shape in read))
    return {
        "calls": calls,
        "keys_read": keys_read,
        "scores": scores,
        "repeated": repeated,
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(facts(sys.argv[1], sys.argv[2:])))
