"""The loss over meshes of eight host devices equals the loss on one, with two collectives per chunk."""

import json
import math
import re

import pytest

from parity_tests.harness.child_process import output_lines

CASES = [
    f"{mesh}-{vocab}-{reduction}"
    for mesh in ("8x1", "1x8", "4x2", "fsdp2-sequence2-tensor2")
    for vocab in ("even", "prime")
    for reduction in ("mean", "none")
]


@pytest.fixture(scope="module")
def results():
    rows = list(map(json.loads, output_lines("workers.sharded_loss")))
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_every_mesh_gives_the_same_loss_and_gradients(results, case):
    row = results[case]
    assert row["error"] <= 1e-12, row


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("8x1")])
def test_two_small_collectives_per_chunk(results, case):
    """One pmax [C] and one psum [3, C] (label smoothing needs the third row), nothing of size V * H."""
    shapes = results[case]["collectives"]
    sizes = [math.prod(map(int, re.search(r"\[([\d,]*)\]", s)[1].split(","))) for s in shapes]
    chunk = 4
    assert sizes
    assert all(size <= 3 * chunk for size in sizes), shapes
    loops = 2 if case.endswith("none") else 1  # the second pass already has the logsumexp
    assert len(sizes) <= 2 * loops


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_gradient_is_scattered_as_the_parameter_is(results, case):
    """Over fsdp and sequence, once, after the loop; over data the parameter is replicated."""
    assert results[case]["scatters"] == ("fsdp" in case)
