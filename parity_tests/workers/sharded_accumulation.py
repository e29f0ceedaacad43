"""A step of two micro-batches on eight host devices against one. Run by `test_reduce_dtype.py`."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaConfig
from parity_tests.reference.errors import relative_error
from train.data.batch import Batch
from train.hardware.collectives import collectives
from train.options import MeshOptions, ModelOptions, RunOptions
from train.program.build import initial_opt_state, initial_params, run_program

jax.config.update("jax_enable_x64", True)

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
)
MICRO, ROWS, LENGTH = 2, 8, 16
MESHES: dict[str, dict[str, int]] = {
    "one": {"data": 1},
    "data8": {"data": 8},
    "data2-fsdp4": {"data": 2, "fsdp": 4},
    "data2-tensor2": {"data": 2, "tensor": 2},
}


def main() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (MICRO, ROWS, LENGTH))
    labels = np.where(rng.random(ids.shape) < 0.3, -100, np.roll(ids, -1, 2))
    positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    want: Any = None
    for name, sizes in MESHES.items():
        options = RunOptions(
            batch_size=MICRO * ROWS,
            micro_batches=MICRO,
            sequence_length=LENGTH,
            model=ModelOptions(parameter_dtype="float64", compute_dtype="float64"),
            mesh=MeshOptions(**sizes),
        )
        devices = jax.devices()[: math.prod(sizes.values())]
        program = run_program(options, CONFIG, devices)
        arrays = (ids, labels, np.zeros_like(ids), positions)
        batch = Batch(
            *(
                jax.device_put(jnp.asarray(array, jnp.int32), program.batch.input_ids.sharding)
                for array in arrays
            )
        )
        with jax.set_mesh(program.mesh):
            params = initial_params(program, 0)
            opt_state = initial_opt_state(program, params)
            parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            compiled = program.step.lower(params, opt_state, batch, None).compile()
            params, _, metrics = compiled(params, opt_state, batch, None)
        got = jax.tree.leaves((params, metrics))
        want = want or got
        reduced = collectives(compiled.as_text()).get("all-reduce")
        row = {
            "case": name,
            "error": max(relative_error(a, b) for a, b in zip(got, want, strict=True)),
            "reduced": reduced.bytes / parameters if reduced else 0.0,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
