"""Attention over meshes of eight host devices equals attention on one."""

import json

import pytest

from parity_tests.harness.child_process import output_lines

MESHES = [
    *("data8", "tensor4", "tensor4-kv2", "tensor4-heads6", "sequence4", "fsdp2-sequence2-tensor2"),
]


@pytest.fixture(scope="module")
def results():
    rows = list(map(json.loads, output_lines("workers.sharded_attention")))
    return {row["case"]: row["errors"] for row in rows}


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_output_and_gradients(results, mesh, mask):
    assert max(results[f"{mesh}-{mask}"]) <= 1e-12


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("mesh", ["sequence4", "fsdp2-sequence2-tensor2"])
@pytest.mark.parametrize(
    "case", ["zigzag-blocked", "zigzag-plain", "zigzag-chunk1-blocked", "zigzag-6-shards-blocked"]
)
def test_zigzag_order_gives_the_same_output_and_gradients(results, mesh, mask, case):
    assert max(results[f"{mesh}-{mask}-{case}"]) <= 1e-12
