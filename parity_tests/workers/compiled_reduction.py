"""The dtypes of matrices that a step for TPUs adds up over devices. Run by `test_reduce_dtype.py`."""

import json
import re
import sys
from dataclasses import replace

import jax

from llama_jax.presets import PRESETS
from train.hardware.hlo import operands, parse
from train.hardware.topology import topology_devices
from train.hardware.transfers import collective_kind
from train.options import MeshOptions, ModelOptions, RunOptions
from train.program.build import run_program


def main() -> None:
    options = RunOptions(
        batch_size=8,
        sequence_length=512,
        model=ModelOptions(compute_dtype="bfloat16", reduce_dtype=sys.argv[1]),  # type: ignore[arg-type]
        mesh=MeshOptions(data=1, fsdp=8),
    )
    config = replace(PRESETS["tiny-4m"], num_hidden_layers=2)
    program = run_program(options, config, topology_devices("v5e:2x4"))
    with jax.set_mesh(program.mesh):
        traced = program.step.trace(program.params, program.opt_state, program.batch, None)
        text = traced.lower().compile().as_text()
    dtypes = set()
    for computation in parse(text).values():
        types = {instruction.name: instruction.type for instruction in computation.instructions}
        for instruction in computation.instructions:
            if collective_kind(instruction) in ("all-reduce", "reduce-scatter"):
                for name in operands(instruction):
                    dtypes |= set(re.findall(r"(\w+)\[\d+,\d+\]", types.get(name, "")))
    print(json.dumps(sorted(dtypes)))


if __name__ == "__main__":
    main()
