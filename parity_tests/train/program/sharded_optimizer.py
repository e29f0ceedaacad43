"""Run by `test_optimizer_contract.py` in a process with eight host devices: optimizers over a mesh.

`... MESHES NAME...`: how many of the meshes, and which optimizers. Prints for each the largest relative
error of two steps against one device, and the share of the state that a device holds.
"""

import sys
from typing import Any, cast

import jax
import numpy as np
import optax

from llama_jax import LlamaConfig
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error
from parity_tests.train.runs import CONFIG
from train.options import MeshOptions, Optimizer, OptimizerOptions, RunOptions
from train.plan.compiled import device_bytes
from train.program.build import Program, initial_opt_state, run_program, shardings_of

use_host_devices(8, "--xla_backend_optimization_level=0")

# wide enough for factored second moments; key and value heads are split over tensor 2
WIDE = {"hidden_size": 128, "intermediate_size": 136, "num_key_value_heads": 4}
MESHES = ({"fsdp": 2, "sequence": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"fsdp": 8})


def program_of(name: Optimizer, mesh: dict[str, int], devices: Any) -> Program:
    options = RunOptions(
        batch_size=8,
        sequence_length=8,
        mesh=MeshOptions(**{"data": 1} | mesh),
        optimizer=OptimizerOptions(name=name, schedule="constant"),
    )
    return run_program(options, LlamaConfig.from_dict(CONFIG | WIDE), devices)


def two_steps(program: Program) -> tuple[Any, Any]:
    """Parameters and state after two updates with the same gradients on every mesh."""
    rng = np.random.default_rng(0)

    def draw() -> Any:
        numbers = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), program.params
        )
        return jax.device_put(numbers, shardings_of(program.params))

    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = program.optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = draw()
    state = initial_opt_state(program, params)
    with jax.set_mesh(program.mesh):
        for _ in range(2):
            params, state = step(params, state, draw())
            state = jax.device_put(state, shardings_of(program.opt_state))
    return params, state


def main() -> None:
    meshes, *names = sys.argv[1:]
    for name in cast("list[Optimizer]", names):
        one = program_of(name, {}, jax.devices()[:1])
        expected = jax.tree.leaves(two_steps(one))
        for mesh in MESHES[: int(meshes)]:
            program = program_of(name, mesh, None)
            actual = jax.tree.leaves(two_steps(program))
            error = max(map(relative_error, actual, expected))
            share = device_bytes(program.opt_state) / device_bytes(one.opt_state)
            print(name, f"{error:.1e}", f"{share:.3f}")


if __name__ == "__main__":
    main()
