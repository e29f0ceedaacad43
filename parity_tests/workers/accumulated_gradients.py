"""A step in several micro-batches over a mesh, against one device. Run by `test_accumulation.py`."""

import json
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax import LlamaConfig
from parity_tests.harness.compilation import FAST_FLAGS
from parity_tests.harness.host_devices import use_host_devices
from parity_tests.reference.errors import relative_error
from parity_tests.train.runs import CONFIG
from train.data.batch import Batch
from train.hardware.links import traffic
from train.hardware.transfers import transfers
from train.options import FsdpGather, MeshOptions, ModelOptions, OptimizerOptions, RunOptions
from train.plan.compiled import device_bytes
from train.program.build import Program, initial_opt_state, initial_params, run_program

# programs for several devices compile twice as fast with these
use_host_devices(8, *FAST_FLAGS)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", True)

ROWS, LENGTH = 8, 16  # of a micro-batch


class Case(NamedTuple):
    mesh: dict[str, int]
    gather: FsdpGather = "layer"
    micro_batches: int = 4
    dropout: float = 0.0


CASES = {
    "data8": Case({"data": 8}),
    "data2-fsdp2-tensor2-once": Case({"data": 2, "fsdp": 2, "tensor": 2}, "step"),
}
SLOW_CASES = {
    "data2-fsdp4": Case({"data": 2, "fsdp": 4}, micro_batches=3),
    "data2-fsdp2-sequence2": Case({"data": 2, "fsdp": 2, "sequence": 2}),
    "stage2-data2-fsdp2": Case({"stage": 2, "data": 2, "fsdp": 2}),
    "fsdp8-once": Case({"fsdp": 8}, "step"),
    "data2-fsdp4-once-in-one": Case({"data": 2, "fsdp": 4}, "step", micro_batches=1),
    "fsdp2-sequence2-tensor2-once": Case({"fsdp": 2, "sequence": 2, "tensor": 2}, "step"),
    "stage2-fsdp2-tensor2-once": Case({"stage": 2, "fsdp": 2, "tensor": 2}, "step"),
    "dropout": Case({"data": 8}, dropout=0.3),
}


def options_of(case: Case) -> RunOptions:
    sizes: dict[str, Any] = {"data": 1} | case.mesh
    return RunOptions(
        batch_size=ROWS * case.micro_batches,
        sequence_length=LENGTH,
        micro_batches=case.micro_batches,
        model=ModelOptions(parameter_dtype="float64", compute_dtype="float64"),
        # clipped, so that an error of the gradient's norm reaches every parameter
        optimizer=OptimizerOptions("sgd", clip_norm=0.01, z_loss=0.01, warmup_steps=0),
        mesh=MeshOptions(fsdp_gather=case.gather, **sizes),
    )


def batch_of(program: Program, vocab: int) -> Any:
    """Different numbers of labels everywhere: replicas, rows and a micro-batch have none at all."""
    micro_batches = program.batch.labels.shape[0]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (micro_batches, ROWS, LENGTH)).astype(np.int32)
    labels = np.roll(ids, -1, -1)
    labels[..., -1] = -100
    labels[0, :3, 4:] = -100
    labels[0, 5:] = -100
    if micro_batches > 2:
        labels[1] = -100
        labels[2, ::2] = -100
    segments = np.sort(rng.integers(0, 3, ids.shape), -1).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    order = program.batch.order
    slots = np.arange(LENGTH) if order is None else np.asarray(order.slots(LENGTH))
    sharding = program.batch.labels.sharding
    ids, labels, segments, positions = (
        jax.device_put(array[..., slots], sharding) for array in (ids, labels, segments, positions)
    )
    return Batch(ids, labels, segments, positions, order)


def one_step(options: RunOptions, config: LlamaConfig, devices: Any) -> tuple[Any, Any, Program]:
    """Parameters, optimizer state and metrics after a step, and the compiled program."""
    program = run_program(options, config, devices)
    batch = batch_of(program, config.vocab_size)
    key = jax.random.key(7) if config.attention_dropout else None
    with jax.set_mesh(program.mesh):
        params = initial_params(program, 0)
        opt_state = initial_opt_state(program, params)
        compiled = program.step.lower(params, opt_state, batch, key).compile()
        out = compiled(params, opt_state, batch, key)
    return jax.tree.map(np.asarray, out), compiled, program


def over_replicas(compiled: Any, program: Program) -> list[tuple[str, int, int]]:
    """Kind, count and bytes of each instruction that sends between replicas; of one, between its shards."""
    axes = {"fsdp"} if program.mesh.shape["data"] == 1 else {"data"}
    return [
        (transfer.kind, transfer.times, transfer.bytes)
        for transfer in transfers(compiled.as_text())
        if any(axes & set(row.axes) for row in traffic([transfer], program.mesh))
    ]


def result(case: Case) -> dict[str, Any]:
    config = replace(LlamaConfig.from_dict(CONFIG), attention_dropout=case.dropout)
    options = options_of(case)
    exact, _, _ = one_step(replace(options, mesh=MeshOptions()), config, jax.devices()[:1])
    got, compiled, program = one_step(options, config, jax.devices())
    gathered = program.mesh.shape["fsdp"] * program.mesh.shape["sequence"]
    assert exact[2].grad_norm > options.optimizer.clip_norm
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    return {
        "error": max(relative_error(a, b) for a, b in pairs),
        "over_replicas": over_replicas(compiled, program),
        # what a device holds of the gradients, in float64 as the parameters
        "gradients": device_bytes(program.params) * (gathered if case.gather == "step" else 1),
    }


def main() -> None:
    cases = SLOW_CASES if sys.argv[1:] == ["slow"] else CASES
    for name, case in cases.items():
        print(json.dumps({"case": name, **result(case)}), flush=True)


if __name__ == "__main__":
    main()
