"""The sums of gradients over devices: their dtype, what rounding costs, and how often they are sent."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from llama_jax.presets import PRESETS
from parity_tests.harness.child_process import output_lines
from parity_tests.reference.tolerances import ROUNDING_RATIO
from train.options import MeshOptions, ModelOptions, RunOptions


@pytest.mark.parametrize(
    "mesh", [pytest.param("fsdp8", marks=pytest.mark.slow), "fsdp2-sequence2-tensor2"]
)
def test_parts_in_bfloat16_are_as_exact_as_hugging_face(mesh: str) -> None:
    """Rule P3 for every gradient; on a CPU the parts are rounded, but added up in float32."""
    (line,) = output_lines("workers.sharded_reduction", mesh)
    ratios: dict[str, dict[str, float]] = json.loads(line)["ratios"]
    for dtype, by_name in ratios.items():
        worst = max(by_name, key=by_name.__getitem__)
        print(f"{mesh}, sums in {dtype}: {worst} {by_name[worst]:.3f} x")
        assert by_name[worst] <= ROUNDING_RATIO
    default, rounded = ratios["None"], ratios["bfloat16"]
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert rounded[f"grad {name}"] > default[f"grad {name}"], "is not rounded"


@pytest.fixture(scope="module")
def accumulated() -> dict[str, dict[str, Any]]:
    rows = map(json.loads, output_lines("workers.sharded_accumulation"))
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("mesh", ["data8", "data2-fsdp4", "data2-tensor2"])
def test_micro_batches_on_a_mesh_add_up_to_the_same(
    accumulated: dict[str, dict[str, Any]], mesh: str
) -> None:
    assert accumulated[mesh]["error"] <= 1e-12


def test_replicas_sum_their_gradients_once(accumulated: dict[str, dict[str, Any]]) -> None:
    """Two micro-batches; what is sent besides are losses."""
    assert 1 <= accumulated["data8"]["reduced"] < 1.01


def test_the_sums_need_the_dtype_of_the_computation() -> None:
    from train.program.build import run_program

    options = RunOptions(
        model=ModelOptions(compute_dtype="float32", reduce_dtype="bfloat16"),
        mesh=MeshOptions(data=1),
    )
    with pytest.raises(ValueError, match="reduce-dtype: found bfloat16 with --model.compute-dtype"):
        run_program(options, PRESETS["tiny-4m"])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: pip install '.[plan]'"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sums_travel_in_the_dtype(dtype: str) -> None:
    (line,) = output_lines("workers.compiled_reduction", dtype)
    assert json.loads(line) == [{"float32": "f32", "bfloat16": "bf16"}[dtype]]
