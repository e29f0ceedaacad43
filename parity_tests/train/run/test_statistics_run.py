"""A run with statistics: what is recorded, where, and that the run itself is the same."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parity_tests.train.runs import Tiny, metrics_of, run_flags
from parity_tests.trajectory.logs import read_log
from train.__main__ import main
from train.monitoring.statistics_record import flat

LAYERS, HEADS = 2, 4
STACKED = "model.layers.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def logged() -> list[tuple[int, dict[str, Any]]]:
    return []


@pytest.fixture(scope="module")
def run(
    tiny: Tiny,
    compile_once: None,
    tmp_path_factory: pytest.TempPathFactory,
    logged: list[tuple[int, dict[str, Any]]],
) -> Path:
    """12 steps, with statistics of steps 5 and 10 and a stand-in for Weights & Biases."""
    session = SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None
    )
    out = tmp_path_factory.mktemp("statistics") / "run"
    flags = run_flags(tiny, out, log__statistics_every=5, log__wandb="project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules,
            "wandb",
            SimpleNamespace(init=lambda **_: session, __spec__=SimpleNamespace()),
        )
        assert main([*flags, "--log.tensorboard"]) == 0
    return out


def test_the_run_is_the_same(run: Path, finished: Path) -> None:
    lines = metrics_of(run)
    assert [line["step"] for line in lines if "statistics" in line] == [5, 10]
    assert [
        {name: value for name, value in line.items() if name != "statistics"} for line in lines
    ] == metrics_of(finished)


def test_the_record(run: Path) -> None:
    record = next(line["statistics"] for line in metrics_of(run) if "statistics" in line)
    grad_norm = next(line["grad_norm"] for line in metrics_of(run) if line["step"] == 5)
    for kind in ("gradient_norm", "update_norm", "parameter_norm", "update_ratio"):
        assert len(record[kind]) == 12, kind
        assert len(record[kind][STACKED]) == LAYERS
        assert isinstance(record[kind]["model.norm.weight"], float)
    squares = sum(value**2 for value in flat({"all": record["gradient_norm"]}).values())
    assert math.sqrt(squares) == pytest.approx(grad_norm, rel=1e-5)
    ratio = record["update_norm"][STACKED][1] / record["parameter_norm"][STACKED][1]
    assert record["update_ratio"][STACKED][1] == pytest.approx(ratio, rel=1e-5)
    assert [len(heads) for heads in record["attention_entropy"]] == [HEADS] * LAYERS
    for name in ("residual_rms", "residual_max", "logit_rms", "dead_units", "saturated_units"):
        assert len(record[name]) == LAYERS, name


def test_other_services_get_scalars(run: Path, logged: list[tuple[int, dict[str, Any]]]) -> None:
    record = next(line["statistics"] for line in metrics_of(run) if line.get("statistics"))
    expected = record["update_norm"][STACKED][1]
    name = f"statistics/update_norm/{STACKED}/1"
    assert next(metrics[name] for step, metrics in logged if step == 5) == expected
    assert not any(name in metrics for step, metrics in logged if step not in (5, 10))
    assert not any(isinstance(value, dict | list) for _, line in logged for value in line.values())
    board = read_log(run / "tensorboard").metrics
    assert board[name][5] == pytest.approx(expected, rel=1e-6)
    assert set(board[name]) == {5, 10}
    assert f"statistics/attention_entropy/{LAYERS - 1}/{HEADS - 1}" in board
