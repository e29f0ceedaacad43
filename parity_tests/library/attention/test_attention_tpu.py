"""Splash attention compiles for a TPU, forward and backward, on every kind of mesh; needs `libtpu`."""

import importlib.util
import json

import pytest

from parity_tests.harness.child_process import output_lines

CASES = [
    *("data4-dim64", "data2-tensor2-packed", "sequence4-packed", "sequence2-tensor2-float32"),
    *("tensor4-kv2-dim80", "tensor4-heads6", "model"),
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module")
def results():
    rows = list(map(json.loads, output_lines("workers.tpu_attention")))
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_three_kernels_are_called(results, case):
    """Forward, the queries' gradient, the keys' and values' gradient."""
    assert results[case]["kernels"] == 3


@pytest.mark.parametrize(
    ("case", "key_bytes"),
    [
        ("sequence4-packed", 2 * 2048 * 4 * 64 * 2),
        ("sequence2-tensor2-float32", 2 * 1024 * 4 // 2 * 64 * 4),
    ],
)
def test_over_a_sequence_axis_keys_are_gathered_and_gradients_scattered(results, case, key_bytes):
    """Keys and values once in each direction; an all-reduce of the gradients would send twice as much."""
    shards = int(case[len("sequence")])
    once = 2 * key_bytes * (shards - 1) / shards
    assert results[case]["sent"] == {"all-gather": once, "reduce-scatter": once}
