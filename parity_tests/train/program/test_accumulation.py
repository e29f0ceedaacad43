"""Gradients of micro-batches: summed over replicas once a step, and equal to those of one device."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from llama_jax.presets import PRESETS
from llama_jax.sharding import MESH_AXES
from parity_tests.harness.child_process import output_lines
from train.options import MeshOptions, RunOptions
from train.program.build import make_program

# float64; reordering a sum of n numbers changes it by at most n * 1e-16, relatively
REDUCTION_ORDER = 1e-13
# parameters that no axis divides, the loss, and the count of tokens
SMALL = 0.15


def check(lines: list[str], names: list[str]) -> None:
    results: dict[str, dict[str, Any]] = {}
    for line in lines:
        result = json.loads(line)
        results[result["case"]] = result
    assert list(results) == names
    for name, result in results.items():
        print(f"{name}: {result['error']:.1e}, {result['over_replicas']}")
        assert 0 < result["error"] <= REDUCTION_ORDER, name
        if name == "dropout":
            continue
        reduced = [
            (times, count)
            for kind, times, count in result["over_replicas"]
            if kind in ("all-reduce", "reduce-scatter")
        ]
        assert {times for times, _ in reduced} == {1}, f"{name}: in a loop"
        size = sum(count for _, count in reduced)
        assert abs(size / result["gradients"] - 1) <= SMALL, name


def test_gradients_are_reduced_once() -> None:
    """Four micro-batches send what one does: an all-reduce of the gradients, outside the loop."""
    check(output_lines("workers.accumulated_gradients"), ["data8", "data2-fsdp2-tensor2-once"])


@pytest.mark.slow
def test_gradients_are_reduced_once_on_every_mesh() -> None:
    names = [
        *("data2-fsdp4", "data2-fsdp2-sequence2", "stage2-data2-fsdp2"),
        *("fsdp8-once", "data2-fsdp4-once-in-one", "fsdp2-sequence2-tensor2-once"),
        *("stage2-fsdp2-tensor2-once", "dropout"),
    ]
    check(output_lines("workers.accumulated_gradients", "slow"), names)


def test_dropout_needs_a_gather_for_each_layer() -> None:
    """Devices that run a step's micro-batches on their own would draw the same numbers."""
    options = RunOptions(mesh=MeshOptions(data=1, fsdp=2, fsdp_gather="step"))
    config = dataclasses.replace(PRESETS["tiny-4m"], attention_dropout=0.1)
    sizes = {"fsdp": 2}
    mesh: Any = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    with pytest.raises(
        ValueError, match=r"mesh\.fsdp-gather: found step for a model with attention"
    ):
        make_program(
            config,
            mesh,
            options.model,
            options.optimizer,
            options=options.mesh,
            steps=1,
            batch_size=8,
            micro_batches=1,
            sequence_length=64,
        )
