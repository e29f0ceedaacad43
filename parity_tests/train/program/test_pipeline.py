"""How many micro-batches and repeats the stages of a mesh get, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from llama_jax.models.pipeline import Pipeline
from llama_jax.presets import PRESETS
from llama_jax.sharding import MESH_AXES
from train.option_checks import validate
from train.options import MeshOptions, ModelOptions, RunOptions
from train.program.build import make_program
from train.program.pipeline import find_pipeline

CONFIG = dataclasses.replace(PRESETS["tiny-4m"], num_hidden_layers=12)


def found(rows: int, **mesh: Any) -> Pipeline | None:
    options = MeshOptions(**{"data": 1} | mesh)
    sizes = {name: getattr(options, name) for name in ("stage", "data", "fsdp")}
    return find_pipeline(options, CONFIG, sizes, rows)


@pytest.mark.parametrize(
    ("rows", "mesh", "expected"),
    [
        (8, {}, None),
        (64, {"stage": 2}, Pipeline(8)),
        (64, {"stage": 4, "fsdp": 2}, Pipeline(16)),
        (4, {"stage": 2}, Pipeline(4)),
        (24, {"stage": 4, "data": 2}, Pipeline(12)),
        (40, {"stage": 2, "fsdp": 2}, Pipeline(4)),  # of 20 rows; 8 do not divide them
        (64, {"stage": 2, "stage_micro_batches": 32, "stage_repeats": 3}, Pipeline(32, 3)),
    ],
)
def test_defaults(rows: int, mesh: dict[str, Any], expected: Pipeline | None) -> None:
    assert found(rows, **mesh) == expected


@pytest.mark.parametrize(
    ("rows", "mesh", "message"),
    [
        (
            40,
            {"stage": 5},
            "mesh.stage: found 5, expected a divisor of the 12 layers: one of 1, 2, 3, 4, 6, 12",
        ),
        (
            8,
            {"stage": 2, "stage_repeats": 4},
            "mesh.stage-repeats: found 4, expected a divisor of the 6 layers of a stage: one of 1, 2, 3, 6",
        ),
        (
            24,
            {"stage": 2, "fsdp": 2, "stage_micro_batches": 3},
            "mesh.stage-micro-batches: found 3, expected a multiple of 2 stages that divides the 12 rows "
            "that a micro-batch has for each of data x fsdp: one of 2, 4, 6, 12",
        ),
        (
            8,
            {"stage_micro_batches": 4},
            "mesh.stage-micro-batches: found 4 with --mesh.stage 1, expected more stages or none of it",
        ),
        (
            8,
            {"stage_repeats": 2},
            "mesh.stage-repeats: found 2 with --mesh.stage 1, expected more stages or none of it",
        ),
    ],
)
def test_what_is_refused(rows: int, mesh: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        found(rows, **mesh)
    assert str(caught.value) == message


def test_offloading_is_refused() -> None:
    mesh = AbstractMesh((2, 1, 1, 1, 1), MESH_AXES)
    options = RunOptions(mesh=MeshOptions(stage=2, data=1))
    with pytest.raises(
        ValueError, match=r"^model\.remat-offload: found input with --mesh.stage 2, expe"
    ):
        make_program(
            CONFIG,
            mesh,  # type: ignore[arg-type]
            ModelOptions(remat="full", remat_offload=("input",)),
            options.optimizer,
            options=options.mesh,
            steps=1,
            batch_size=4,
            micro_batches=1,
            sequence_length=8,
        )


@pytest.mark.parametrize("name", ["stage_micro_batches", "stage_repeats"])
def test_counts(name: str) -> None:
    options = RunOptions(mesh=MeshOptions(stage=2, **{name: 0}))
    flag = name.replace("_", "-")
    with pytest.raises(ValueError, match=f"^mesh.{flag}: found 0, expected at least 1$"):
        validate(options)
