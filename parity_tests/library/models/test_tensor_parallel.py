"""A residual stream split over tensor by tokens: the same values, and no all-reduce of its size."""

import json

import pytest

from parity_tests.harness.child_process import output_lines
from parity_tests.reference.tolerances import ROUNDING_RATIO

LAYERS = 2


def rows(*worker: str) -> dict:
    return {row["case"]: row for row in map(json.loads, output_lines(*worker))}


@pytest.fixture(scope="module")
def results():
    return rows("workers.sharded_layers")


@pytest.fixture(scope="module")
def slow_results():
    return rows("workers.sharded_layers", "slow")


@pytest.fixture(scope="module")
def rounding():
    return rows("workers.sharded_rounding")


@pytest.mark.parametrize("size", [3, 4])
def test_rings(results, size):
    assert max(results[f"ring{size}"]["errors"]) <= 1e-14


@pytest.mark.parametrize("case", ["tensor4", "tensor4-full", "zigzag", "length18", "batch2"])
def test_the_same_loss_and_gradients(results, case):
    assert max(results[case]["errors"]) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("batch3", "length1", "tensor8", "tensor3", "one-kv-head", "six-heads", "intermediate50"),
        *("slices", "dropout", "unrolled", "kept", "offloaded", "int8", "int4"),
    ],
)
def test_the_same_loss_and_gradients_in_other_configurations(slow_results, case):
    assert max(slow_results[case]["errors"]) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", ["tensor4", "fsdp2-sequence2-tensor2"])
def test_as_exact_as_hugging_face(rounding, mesh, dtype):
    for number, (ours, theirs) in rounding[f"{mesh}-{dtype}"]["errors"].items():
        assert ours <= ROUNDING_RATIO * theirs, f"{number}: {ours:.3e}, Hugging Face {theirs:.3e}"


@pytest.mark.parametrize("case", ["tensor4", "tensor4-full", "zigzag"])
def test_no_activation_is_all_reduced(results, case):
    assert results[case]["largest_all_reduce"] < results[case]["activations"]


def test_one_gather_and_one_scatter_for_each_block(results):
    """Each takes three permutes on a ring of four.

    Forward, attention and MLP gather their input and scatter their output; backward, they gather the
    cotangent of the output and scatter that of the input. Recomputed, the last scatter is not needed.
    """
    hops = 3
    assert results["tensor4"]["permutes"] == LAYERS * hops * (4 + 4)
    assert results["tensor4-full"]["permutes"] == LAYERS * hops * (4 + 4 + 3)
