"""Traces from several devices, and checks on machines without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.cases import BY_NAME, weights_of, write_hf_directory
from parity_tests.harness.child_process import ROOT, output_lines
from parity_tests.traces.check import check


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its recording over eight devices."""
    case = BY_NAME["gqa_3_to_1"]
    folder = tmp_path_factory.mktemp("sharded")
    write_hf_directory(folder / "checkpoint", case.config, weights_of(case.config))
    output_lines("workers.sharded_trace", str(folder / "checkpoint"), str(folder / "trace"))
    return folder / "checkpoint", folder / "trace"


def test_a_recording_over_eight_devices(sharded: tuple[Path, Path]) -> None:
    verdict = check(sharded[1], sharded[0])
    assert verdict.holds, [(r.name, r.ratio) for r in verdict.departures]
    assert len(verdict.values) == 2 * 15 + 4
    assert verdict.reference == "float64 oracle"


@pytest.mark.slow
def test_a_check_without_torch(sharded: tuple[Path, Path], tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules |= {'torch': None, 'transformers': None}; "
        "from parity_tests.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    numbers = tmp_path / "check.json"
    arguments = "check", sharded[1], "--model", sharded[0], "--json", numbers
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "compared with the llama_jax in float64" in " ".join(done.stdout.split())
    saved = json.loads(numbers.read_text())
    assert saved["holds"]
    assert saved["reference"] == "llama_jax in float64"
