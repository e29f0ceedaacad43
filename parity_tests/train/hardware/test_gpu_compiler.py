"""Where the compiler for NVIDIA GPUs is looked for, and what is said of one that cannot serve."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import pytest

from train.hardware import gpu_compiler
from train.hardware.gpu_compiler import PLUGIN, TOOLS, use_gpu_compiler

MODULE, PTXAS = "jax_plugins/xla_cuda12/__init__.py", "nvidia/cuda_nvcc/bin/ptxas"
INTACT = {PLUGIN: (jax.__version__, MODULE), TOOLS: ("12.9.86", PTXAS)}


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu_compiler, "COMPILER_FOLDER", tmp_path / "gpu-compiler")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "environment")])
    for name in ("PATH", "XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def install(folder: Path, packages: dict[str, tuple[str, str]]) -> None:
    """Packages of one file each."""
    for name, (version, file) in packages.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("12345678")
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (metadata / "RECORD").write_text(f"{file},sha256=x,8\n{metadata.name}/RECORD,,\n")


@pytest.mark.parametrize("place", ["gpu-compiler", "environment"])
def test_both_places(tmp_path, place: str) -> None:
    install(tmp_path / place, INTACT)
    os.environ["XLA_FLAGS"] = "--xla_a=1"
    use_gpu_compiler()
    nvcc = tmp_path / place / "nvidia" / "cuda_nvcc"
    assert os.environ["XLA_FLAGS"] == f"--xla_a=1 --xla_gpu_cuda_data_dir={nvcc}"
    assert os.environ["PATH"].split(os.pathsep)[0] == str(nvcc / "bin")
    assert sys.path.count(str(tmp_path / place)) == 1


def test_another_version_in_the_environment_is_passed_over(tmp_path) -> None:
    install(tmp_path / "environment", INTACT | {PLUGIN: ("0.1.0", MODULE)})
    install(tmp_path / "gpu-compiler", INTACT)
    use_gpu_compiler()
    assert sys.path[-1] == str(tmp_path / "gpu-compiler")


def error(folder: Path) -> str:
    """What is said of the compiler, of a message in which the rest is fixed."""
    with pytest.raises(ValueError) as caught:
        use_gpu_compiler()
    message = str(caught.value)
    begin = "topology: the compiler for NVIDIA GPUs "
    end = (
        f": make plan-gpu (or python -m pip install --no-deps --upgrade --target {folder} "
        f"{PLUGIN}=={jax.__version__} {TOOLS})"
    )
    assert message.startswith(begin)
    assert message.endswith(end)
    return message[len(begin) : -len(end)]


@pytest.mark.parametrize(
    ("packages", "problem"),
    [
        ({}, "is not installed"),
        ({TOOLS: INTACT[TOOLS]}, "is not installed"),
        ({PLUGIN: ("0.1.0", MODULE)}, f"is version 0.1.0, not JAX's {jax.__version__}"),
        ({PLUGIN: INTACT[PLUGIN]}, f"lacks {TOOLS}"),
    ],
)
def test_without_the_compiler(packages, problem: str, tmp_path) -> None:
    folder = tmp_path / "gpu-compiler"
    install(folder, packages)
    assert error(folder) == problem


@pytest.mark.parametrize("file", [MODULE, PTXAS])
@pytest.mark.parametrize("damage", ["missing", "empty", "longer"])
def test_a_damaged_compiler(file: str, damage: str, tmp_path) -> None:
    """A truncated plugin would end the process with a signal."""
    folder = tmp_path / "gpu-compiler"
    install(folder, INTACT)
    if damage == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_text("" if damage == "empty" else "123456789")
    assert error(folder) == f"is damaged ({folder / file})"
