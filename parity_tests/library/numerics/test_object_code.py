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
def file(tmp_path, monkeypatch):
    """Where the code of the kernels of few rows would be kept in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = object_code._file("kernel")
    assert tmp_path in file.parents
    return file


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


def test_what_is_written_is_read(file):
    assert object_code._read(file) is None
    object_code._write(file, CODES)
    assert object_code._read(file) == CODES
    assert list(object_code._read(file)) == list(CODES)  # later functions refer to earlier ones
    assert list(file.parent.iterdir()) == [file]
    assert file.parent.stat().st_mode & 0o077 == 0


def test_old_files_go(file, monkeypatch):
    monkeypatch.setattr(object_code, "_MOST_FILES", 2)
    files = [file.with_name(name) for name in "abc"]
    for one in files:
        object_code._write(one, CODES)
    assert sorted(file.parent.iterdir()) == files[1:]


@pytest.mark.parametrize("damage", ["bits", "end", "empty", "folder"])
def test_damaged_code_is_not_read(file, damage):
    """Nor is code that another user could have written."""
    object_code._write(file, CODES)
    content = file.read_bytes()
    if damage == "bits":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "end":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.parent.chmod(0o777)
    assert object_code._read(file) is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    object_code._write(tmp_path / "file" / "folder" / "code", CODES)


def test_no_home_directory(monkeypatch):
    def no_home(purpose):
        raise ValueError("no home")

    monkeypatch.setattr(object_code, "cache_directory", no_home)
    assert object_code._file("kernel") is None


@pytest.mark.parametrize("change", ["module", "variable", "processor", "features", "version"])
def test_another_file_for_other_code(file, monkeypatch, change):
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
    assert object_code._file(module) != file


def test_another_file_for_other_sources(file, monkeypatch):
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "frame.py")
    )
    assert object_code._file("kernel") != file


def test_a_function_that_needs_numba_is_refused():
    def allocate(size):
        return len(np.empty(size))

    with pytest.raises(RuntimeError, match=r"llama_jax_allocate refers to .*NRT"):
        exported("llama_jax_allocate")(allocate)


def test_each_user_has_a_folder(file, monkeypatch):
    object_code._write(file, CODES)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert object_code._read(file) is None
    assert object_code._file("kernel").parent != file.parent
