"""A residual stream split over tensor by tokens: the same values, and no all-reduce of its size."""

import json

import pytest

from parity_tests.harness.child_process import output_lines

LAYERS = 2


@pytest.fixture(scope="module")
def results():
    rows = list(map(json.loads, output_lines("workers.sharded_layers")))
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rings_of_any_size(results, size):
    assert max(results[f"ring{size}"]["errors"]) <= 1e-14


@pytest.mark.parametrize(
    "mesh",
    [
        *("tensor4", "tensor4-full", "fsdp2-sequence2-tensor2", "data2-tensor4-length18"),
        "tensor4-kv2-slices",
    ],
)
def test_the_same_loss_and_gradients(results, mesh):
    assert max(results[mesh]["errors"]) <= 1e-12


@pytest.mark.parametrize("mesh", ["tensor4", "tensor4-full"])
def test_no_activation_is_all_reduced(results, mesh):
    assert results[mesh]["largest_all_reduce"] < results[mesh]["residual"]


def test_one_gather_and_one_scatter_for_each_block(results):
    """Each takes three permutes on a ring of four.

    Forward, attention and MLP gather their input and scatter their output; backward, they gather the
    cotangent of the output and scatter that of the input. Recomputed, the last scatter is not needed.
    """
    hops = 3
    assert results["tensor4"]["permutes"] == LAYERS * hops * (4 + 4)
    assert results["tensor4-full"]["permutes"] == LAYERS * hops * (4 + 4 + 3)
