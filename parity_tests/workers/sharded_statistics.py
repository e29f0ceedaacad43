"""Run by `test_statistics.py` in a process with eight host devices: statistics over a mesh.

`... MESHES`: how many of the meshes. Prints for each the largest relative error of any statistic against
one device, and whether the updated parameters and state are, bit for bit, those of the step without.
"""

import sys
from typing import Any

import jax
import numpy as np

from llama_jax import LlamaConfig
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error
from parity_tests.train.runs import CONFIG
from train.data.placement import place_batch, rows_of_process
from train.options import MeshOptions, ModelOptions, RunOptions
from train.program.build import (
    Program,
    initial_opt_state,
    initial_params,
    run_program,
    shardings_of,
)

use_host_devices(8, "--xla_backend_optimization_level=0")

LENGTH, ROWS = 32, 16
MESHES: tuple[dict[str, Any], ...] = (
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 8},
    {"data": 2, "fsdp": 4, "fsdp_gather": "step"},
    {"stage": 2, "fsdp": 2, "tensor": 2},
)


def program_of(mesh: dict[str, Any], devices: Any) -> Program:
    options = RunOptions(
        batch_size=ROWS,
        micro_batches=2,
        sequence_length=LENGTH,
        mesh=MeshOptions(**{"data": 1} | mesh),
        model=ModelOptions(parameter_dtype="float64"),
    )
    return run_program(options, LlamaConfig.from_dict(CONFIG), devices)


def run(program: Program, params: Any, step: Any) -> Any:
    """What a step of `program` returns, as numpy arrays."""
    rng = np.random.default_rng(0)
    shape = ROWS, LENGTH
    windows = {
        "input_ids": rng.integers(0, CONFIG["vocab_size"], shape).astype(np.int32),
        "labels": rng.integers(0, CONFIG["vocab_size"], shape).astype(np.int32),
        "segment_ids": np.sort(rng.integers(0, 3, shape), -1).astype(np.int32),
        "position_ids": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }
    with jax.set_mesh(program.mesh):
        batch = place_batch(program.batch, rows_of_process(program.batch), windows)
        params = jax.device_put(params, shardings_of(program.params))
        state = initial_opt_state(program, params)
        return jax.tree.map(np.asarray, step(params, state, batch, None))


def main() -> None:
    one = program_of({}, jax.devices()[:1])
    params = jax.tree.map(np.asarray, initial_params(one, 0))
    layers = params["model"]["layers"]
    layers["self_attn"]["q_proj"]["weight"] = layers["self_attn"]["q_proj"]["weight"] * 20
    *_, expected = run(one, params, one.statistics_step)
    for mesh in MESHES[: int(sys.argv[1])]:
        program = program_of(mesh, None)
        updated, state, _, actual = run(program, params, program.statistics_step)
        plain, plain_state, _ = run(program, params, program.step)
        pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
        error = max(relative_error(a, b) for a, b in pairs)
        pairs = zip(*map(jax.tree.leaves, ((updated, state), (plain, plain_state))), strict=True)
        same = all(a.tobytes() == b.tobytes() for a, b in pairs)
        print(mesh, f"{error:.1e}", same)


if __name__ == "__main__":
    main()
