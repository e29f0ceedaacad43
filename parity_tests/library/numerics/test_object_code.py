"""Kernels as object code: kept for processes that follow, and nothing of numba in it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import binding

from llama_jax.numerics.cpu import object_code
from llama_jax.numerics.cpu.available import step_kernels
from llama_jax.numerics.cpu.exported import exported

pytestmark = pytest.mark.skipif(step_kernels() is None, reason="no numba")

CODES = {"llama_jax_one": b"code", "llama_jax_other": b"more"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where code is kept if the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, _ = object_code._folders()
    assert tmp_path in folder.parents
    return folder


def test_a_process_that_follows_does_without_numba():
    program = """
import sys
import jax.numpy as jnp, numpy as np
from llama_jax.numerics.cpu.available import step_kernels
x, weight = jnp.ones((1, 64)), jnp.asarray(np.arange(64 * 32).reshape(32, 64), jnp.float32)
(out,) = step_kernels().multiply(x, [(weight, jnp.ones((32, 1)), jnp.ones((32, 1)))])
np.testing.assert_array_equal(out[0], np.asarray(weight).sum(-1))
assert "numba" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_written_is_read(folder):
    assert object_code._read("code") is None
    object_code._write("code", CODES)
    assert object_code._read("code") == CODES
    assert list(object_code._read("code")) == list(CODES)  # later functions refer to earlier ones
    assert list(folder.iterdir()) == [folder / "code"]


@pytest.mark.parametrize("first", ["not writable", "no home directory", "none can be written"])
def test_where_the_cache_cannot_be(tmp_path, monkeypatch, first):
    """Code is kept beside the bytecode or, at last, not at all."""

    def no_home(purpose):
        raise ValueError("no home")

    (tmp_path / "file").touch()
    monkeypatch.setattr(object_code, "__file__", str(tmp_path / "object_code.py"))
    monkeypatch.setattr(object_code, "cache_directory", lambda _: tmp_path / "file" / "cache")
    if first == "no home directory":
        monkeypatch.setattr(object_code, "cache_directory", no_home)
    elif first == "none can be written":
        (tmp_path / "__pycache__").touch()
    object_code._write("code", CODES)
    kept = None if first == "none can be written" else CODES
    assert object_code._read("code") == kept


@pytest.mark.parametrize("change", ["module", "variable", "processor", "features", "version"])
def test_another_file_for_other_code(monkeypatch, change):
    name = object_code._file_name("kernel")
    module = "tiled" if change == "module" else "kernel"
    if change == "variable":
        monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    elif change == "processor":
        monkeypatch.setattr(binding, "get_host_cpu_name", lambda: "znver5")
    elif change == "features":
        features = binding.get_host_cpu_features()
        features["avx512f"] = not features.get("avx512f")
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    elif change == "version":
        monkeypatch.setattr(object_code, "version", lambda name: "1.2")
    assert object_code._file_name(module) != name


def test_another_file_for_other_sources(monkeypatch):
    name, read = object_code._file_name("kernel"), Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "frame.py")
    )
    assert object_code._file_name("kernel") != name


def test_a_function_that_needs_numba_is_refused():
    def allocate(size):
        return len(np.empty(size))

    with pytest.raises(RuntimeError, match=r"llama_jax_allocate refers to .*NRT"):
        exported("llama_jax_allocate")(allocate)


def test_each_user_has_a_folder(folder, monkeypatch):
    object_code._write("code", CODES)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert object_code._read("code") is None
    assert object_code._folders()[0] != folder
