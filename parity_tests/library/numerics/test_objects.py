"""The kernels' machine code that a process leaves for the next one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.child_process import ROOT

pytest.importorskip("numba")

from llama_jax.numerics.cpu import objects
from llama_jax.numerics.cpu.available import tiled_kernel

pytestmark = pytest.mark.skipif(
    tiled_kernel() is None or sys.platform != "linux", reason="no kernel, or no ELF"
)

MULTIPLY = """
import sys
import jax.numpy as jnp
import numpy as np
from llama_jax.numerics.cpu.available import tiled_kernel
rng = np.random.default_rng(0)
a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 64, 96), (2, 96, 64)))
print(np.asarray(tiled_kernel().multiply(a, b, jnp.float32)).tobytes().hex())
print("numba" in sys.modules)
import numba
@numba.njit
def fail(x):
    if x > 1:
        raise ValueError("numba still can")
try:
    fail(2)
except ValueError as error:
    print(error)
"""


def run(bytecode: Path) -> tuple[str, ...]:
    """The product, whether numba was imported for it, and what numba raises afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", MULTIPLY],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPYCACHEPREFIX": str(bytecode)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.split("\n")[:3])


def test_the_next_process_does_without_numba(tmp_path):
    first = run(tmp_path)
    assert first[1:] == ("True", "numba still can")
    (file,) = tmp_path.rglob("tiled-*.objects")
    written = file.read_bytes()
    assert run(tmp_path) == (first[0], "False", "numba still can")
    file.write_bytes(written[:-1])
    assert run(tmp_path) == first
    assert file.read_bytes() == written


def test_of_other_sources_it_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    path, key = objects._place("tiled")
    monkeypatch.setattr(objects, "version", lambda _: "0.0")
    assert objects._place("tiled")[0] == path
    assert objects._place("tiled")[1] != key
    monkeypatch.setenv("NUMBA_CPU_NAME", "other")
    assert objects._place("tiled")[0] != path
    from llama_jax.numerics.cpu import tiled

    data = objects._packed(tiled, key)
    with pytest.raises(ValueError, match="something else"):
        objects._load(data, "another")
    with pytest.raises(ValueError, match="damaged"):
        objects._load(data[:100], key)
    with pytest.raises(ValueError, match="damaged"):
        objects._load(b"", key)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file")[1:] == ("True", "numba still can")


def test_what_needs_more_of_numba_is_not_kept(monkeypatch):
    """A function that allocates an array would end a process without numba."""
    from llama_jax.numerics.cpu import tiled

    monkeypatch.setattr(objects, "_undefined_symbols", lambda _: ["malloc", "NRT_Allocate"])
    with pytest.raises(ValueError, match="llama_jax_tiled_task needs numba for NRT_Allocate"):
        objects._packed(tiled, "")
