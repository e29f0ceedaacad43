"""The cause of a departure is named, of faults in programs that know nothing of the catalogue."""

from pathlib import Path
from typing import Any

import pytest

from parity_tests.faults.planted_jax import CASE, PLANTS, record_plants
from parity_tests.harness.cases import weights_of, write_hf_directory
from parity_tests.traces.check import check

COMPILED: dict[Any, Any] = {}
SAMPLE = ("Meta's rows", "scaled by 0.3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_directory(
        tmp_path_factory.mktemp("causes") / "checkpoint", CASE.config, weights_of(CASE.config)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in PLANTS]
)
def test_a_fault_in_jax(name: str, directory: Path, tmp_path: Path) -> None:
    plant = PLANTS[name]
    verdict = check(record_plants(tmp_path / "trace", plant), directory, compiled=COMPILED)
    assert verdict.departures[0].name == plant.begins
    assert verdict.causes is not None
    assert verdict.causes[0].name == plant.fault
