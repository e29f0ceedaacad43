"""Run by `test_guard.py` in a process with eight host devices: a guarded step over a mesh.

Prints for each action whether all decisions are those of one device, the largest relative error of
parameters and averages, and how many steps had an outlier or were not finite.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaConfig
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error
from parity_tests.train.runs import CONFIG, VOCAB
from train.data.batch import Batch
from train.options import (
    AverageOptions,
    GuardAction,
    GuardOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
)
from train.program.build import initial_opt_state, initial_params, run_program

use_host_devices(8, "--xla_backend_optimization_level=0")

STEPS = 12


def decisions_of(action: GuardAction, mesh: dict[str, int], devices: Any) -> tuple[Any, Any]:
    """The decisions of all steps, and the parameters and averages after the last."""
    options = RunOptions(
        batch_size=8,
        sequence_length=8,
        micro_batches=2,
        steps=STEPS,
        model=ModelOptions(compute_dtype="float32"),
        # in sgd's parameters an outlier that was let through shows
        optimizer=OptimizerOptions(name="sgd", schedule="constant", learning_rate=1e-2),
        guard=GuardOptions(action, window=4, norm_sigma=3.0, non_finite=2),
        average=AverageOptions(0.8),
        mesh=MeshOptions(**{"data": 1} | mesh),
    )
    program = run_program(options, LlamaConfig.from_dict(CONFIG), devices)
    rng = np.random.default_rng(0)
    decisions = []
    with jax.set_mesh(program.mesh):
        params = initial_params(program, 0)
        opt_state = initial_opt_state(program, params)
        for number in range(STEPS):
            ids = rng.integers(0, VOCAB, (2, 4, 8)).astype(np.int32)
            if number in (6, 9):  # one token again and again: another gradient than of all others
                ids[:] = 7
            positions = np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape)
            batch = Batch(ids, np.roll(ids, -1, -1), np.zeros_like(ids), positions)
            placed = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, program.batch))
            if number == 10:  # not finite, on one device
                params["lm_head"]["weight"] = params["lm_head"]["weight"].at[0, 0].set(jnp.nan)
            if number == 11:
                params["lm_head"]["weight"] = params["lm_head"]["weight"].at[0, 0].set(0.0)
            params, opt_state, metrics = program.step(params, opt_state, placed, None)
            decisions.append(jax.device_get(metrics.guard))
    return decisions, (params, opt_state.inner.average)


def main() -> None:
    for action in cast("list[GuardAction]", ["skip", "clip", "clip-layers"]):
        expected, numbers = decisions_of(action, {}, jax.devices()[:1])
        actual, others = decisions_of(action, {"fsdp": 4, "tensor": 2}, None)
        pairs = list(zip(actual, expected, strict=True))
        same = all(
            np.array_equal(a.outlier, b.outlier) and a.non_finite == b.non_finite for a, b in pairs
        )
        error = max(map(relative_error, jax.tree.leaves(others), jax.tree.leaves(numbers)))
        events = sum(bool(one.outlier.any() or one.non_finite) for one in expected)
        print(action, "same" if same else "different", f"{error:.1e}", events)


if __name__ == "__main__":
    main()
