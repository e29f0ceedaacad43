"""XLA's compiler for NVIDIA GPUs, which needs neither a GPU nor a driver."""

import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

import jax

# Beside the environment's own packages, not among them: in there, every start of JAX would try to use it,
# and log a traceback where there is no driver.
COMPILER_FOLDER = Path(sys.prefix) / "gpu-compiler"
PLUGIN, TOOLS = "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"


def use_gpu_compiler() -> None:
    """Make XLA find its compiler: the environment's own (jax[cuda12]) or what `make plan-gpu` installs.

    Raises:
        ValueError: neither is there, of JAX's version and undamaged.
    """
    problem = None
    for folders in (sys.path, [str(COMPILER_FOLDER)]):
        plugin, tools = _find(PLUGIN, folders), _find(TOOLS, folders)
        problem = _problem(plugin, tools)
        if problem is None:
            break
    if problem is not None:
        raise ValueError(
            f"topology: the compiler for NVIDIA GPUs {problem}: make plan-gpu (or python -m pip install "
            f"--no-deps --upgrade --target {COMPILER_FOLDER} {PLUGIN}=={jax.__version__} {TOOLS})"
        )
    assert plugin is not None
    assert tools is not None
    if (folder := str(plugin.locate_file(""))) not in sys.path:
        sys.path.append(folder)
    nvcc = Path(str(tools.locate_file("nvidia/cuda_nvcc")))
    os.environ["PATH"] = f"{nvcc / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={nvcc}"
    os.environ["XLA_FLAGS"] = flags.strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("jax_plugins.xla_cuda12").setLevel(logging.CRITICAL)


def _find(name: str, folders: Sequence[str]) -> Distribution | None:
    return next(iter(importlib.metadata.distributions(name=name, path=list(folders))), None)


def _problem(plugin: Distribution | None, tools: Distribution | None) -> str | None:
    if plugin is None:
        return "is not installed"
    if plugin.version != jax.__version__:
        return f"is version {plugin.version}, not JAX's {jax.__version__}"
    if tools is None:
        return f"lacks {TOOLS}"
    damaged = _damaged_file(plugin) or _damaged_file(tools)
    return None if damaged is None else f"is damaged ({damaged})"


def _damaged_file(package: Distribution) -> Path | None:
    """A file that is missing or has another size than when it was installed; loading such can crash."""
    for file in package.files or ():
        path = Path(str(file.locate()))
        if file.size is not None and (not path.is_file() or path.stat().st_size != file.size):
            return path
    return None
