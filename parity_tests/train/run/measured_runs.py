"""Run by `test_memory.py` on eight host devices: DATA CONFIG FOLDER; prints one JSON object."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.numerics.xla_options import reserve_host_threads
from parity_tests.train.runs import Tiny, metrics_of, run_flags, same_bits, state_of
from train import checkpoints
from train.__main__ import main
from train.checkpoints import FOLDER
from train.program import build, donation
from train.program.optimizer_state import round_stochastically
from train.run import begin, resume

MESH = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}


def buffers(arrays: list[jax.Array]) -> dict[int, int]:
    """Bytes of each distinct piece of memory. Batches, which are integers, and metrics do not count.

    Of a donated array in the host's memory some shards may be deleted and others not: `Array.is_deleted`
    tells only of the first.
    """
    return {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in arrays
        if array.ndim and jnp.issubdtype(array.dtype, jnp.inexact) and not array.is_deleted()
        for shard in array.addressable_shards
        if not shard.data.is_deleted()
    }


def live() -> int:
    return sum(buffers(jax.live_arrays()).values())


class Measured:
    """The most bytes of one run at any time, and in its steps, with what XLA allocates during them."""

    def __init__(self) -> None:
        self.state = self.peak = self.first_step = 0
        self.in_place: list[int] = []

    def sample(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def sampled(*arguments: Any) -> Any:
            result = function(*arguments)
            self.peak = max(self.peak, live())
            return result

        return sampled

    def step(self, program: build.Program) -> Callable[..., Any]:
        def step(params: Any, opt_state: Any, batch: Any, key: Any) -> Any:
            before = live()
            state = buffers(jax.tree.leaves((params, opt_state)))
            compiled = program.step.lower(params, opt_state, batch, key).compile()
            result = jax.block_until_ready(program.step(params, opt_state, batch, key))
            after = buffers(jax.tree.leaves(result[:2]))
            self.state = sum(state.values())
            # what is not overwritten is copied
            self.in_place.append(sum(state[pointer] for pointer in state.keys() & after.keys()))
            allocated = compiled.memory_analysis().temp_size_in_bytes * jax.device_count()
            peak = before + allocated + self.state - self.in_place[-1]
            self.first_step = self.first_step or peak
            self.peak = max(self.peak, peak)
            return result

        return step


def measure(*arguments: str) -> dict[str, Any]:
    gc.collect()
    assert live() == 0
    measured = Measured()
    run_program, fingerprints, copied = (
        build.run_program, checkpoints.fingerprints, donation._copied)  # fmt: skip

    def measured_program(*given: Any) -> build.Program:
        program = run_program(*given)
        return program._replace(step=measured.step(program))

    begin.run_program = resume.run_program = measured_program
    checkpoints.fingerprints = measured.sample(fingerprints)
    donation._copied = measured.sample(copied)
    try:
        assert main(list(arguments)) == 0
    finally:
        begin.run_program = resume.run_program = run_program
        checkpoints.fingerprints, donation._copied = fingerprints, copied
    return {
        "state": measured.state,
        "peak": measured.peak,
        "first_step": measured.first_step,
        "in_place": measured.in_place,
    }


def rounded_alike() -> bool:
    """Whether stochastic rounding gives the same numbers on one device and however a mesh splits them."""
    x, key = jax.random.normal(jax.random.key(1), (8, 16, 24)), jax.random.key(0)
    expected = np.asarray(jax.jit(round_stochastically)(x, key))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = P(None, "a", "b"), P("b", None, "a"), P(("a", "b"))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    split = [
        jax.jit(round_stochastically, out_shardings=sharding)(jax.device_put(x, sharding), key)
        for sharding in shardings
    ]
    return all(np.array_equal(expected, np.asarray(array)) for array in split)


def outcomes(tiny: Tiny, folder: Path) -> dict[str, Any]:
    run = folder / "run"
    options = MESH | {
        "steps": 2,
        "checkpoint__every": 2,
        "evaluation__every": 0,
        "optimizer__schedule": "constant",
    }
    results = {"fresh": measure(*run_flags(tiny, run, **options))}

    def resumed(name: str, *flags: str) -> Path:
        copy = Path(shutil.copytree(run, folder / name))
        results[name] = measure("resume", str(copy), "--steps", "4", *flags)
        return copy

    resumed("resumed")
    resumed("other_mesh", "--mesh.fsdp", "2", "--mesh.sequence", "2")
    # the newest checkpoint is read to its end, found damaged, and the one before it taken
    copy = resumed("twice")
    facts = copy / FOLDER / "4/facts/metadata"
    content = json.loads(facts.read_text())
    content["fingerprints"][-1] += 1
    facts.write_text(json.dumps(content))
    results["after_damage"] = measure("resume", str(copy))

    # in the host's memory, in bfloat16
    moved, copy = folder / "moved", folder / "moved_resumed"
    changes = {"steps": 4, "optimizer__state_dtype": "bfloat16", "model__remat": "full"}
    flags = ["--optimizer.offload", "--model.remat-offload", "input", "gate"]
    results["moved"] = measure(*run_flags(tiny, moved, **options | changes), *flags)
    shutil.copytree(moved, copy)
    shutil.rmtree(copy / FOLDER / "4")
    results["moved_resumed"] = measure("resume", str(copy))
    results["moved_same_bits"] = same_bits(state_of(copy, 4), state_of(moved, 4))
    results["moved_same_metrics"] = metrics_of(copy) == metrics_of(moved)

    results["same_rounding"] = rounded_alike()

    weights = folder / "weights"
    assert main(["export", str(run), str(weights)]) == 0
    options |= {"model__config": None, "model__init_from": weights}
    results["weights"] = measure(*run_flags(tiny, folder / "from_weights", **options))
    return results


if __name__ == "__main__":
    reserve_host_threads()  # as a run does, but before this file looks at JAX's arrays
    data, config, folder = map(Path, sys.argv[1:])
    print("\n" + json.dumps(outcomes(Tiny(data, config, folder), folder)))
