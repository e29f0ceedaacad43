"""Splash attention compiles for a TPU, forward and backward, on every kind of mesh; needs `libtpu`."""

import importlib.util
import json

import pytest

from parity_tests.harness.child_process import output_lines

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
    rows = list(map(json.loads, output_lines("workers.tpu_attention", env=ABSENT)))
    return {row["case"]: row["kernels"] for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_three_kernels_are_called(results, case):
    """Forward, the queries' gradient, the keys' and values' gradient."""
    assert results[case] == 3
