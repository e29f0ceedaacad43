"""Splash attention compiles for a TPU, forward and backward, on every kind of mesh; needs `libtpu`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    *("data4-dim64", "data2-tensor2-packed", "sequence4-packed", "sequence2-tensor2-float32"),
    *("tensor4-kv2-dim80", "tensor4-heads6", "model"),
]
# an absent TPU must be described, or libtpu looks for one on the network
ABSENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        (sys.executable, "-m", "parity_tests.tpu_attention"),
        cwd=ROOT,
        env=os.environ | ABSENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"]: row["kernels"] for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_three_kernels_are_called(results, case):
    """Forward, the queries' gradient, the keys' and values' gradient."""
    assert results[case] == 3
