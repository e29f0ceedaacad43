"""Attention over meshes of eight host devices equals attention on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MESHES = [
    *("data8", "tensor4", "tensor4-kv2", "tensor4-heads6", "sequence4", "fsdp2-sequence2-tensor2"),
]


@pytest.fixture(scope="module")
def results():
    done = subprocess.run(
        (sys.executable, "-m", "parity_tests.sharded_attention"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"]: row["errors"] for row in rows}


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_output_and_gradients(results, mesh, mask):
    assert max(results[f"{mesh}-{mask}"]) <= 1e-12
