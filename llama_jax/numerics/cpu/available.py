"""Which kernels a program may use, in a module that does not import numba."""

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType

import jax

from llama_jax.numerics.backend import target_platform


def step_kernels() -> ModuleType | None:
    """The module `call`, if this program is for one CPU and numba is installed (extra `cpu`)."""
    is_one = jax.sharding.get_abstract_mesh().empty
    return _kernels("call") if is_one and target_platform() == "cpu" else None


@cache
def tiled_kernel() -> ModuleType | None:
    """The module `tiled_call`, if numba is installed and the processor has the registers that it needs."""
    return _kernels("tiled_call") if _has_vectors() else None


@cache
def flash_kernel() -> ModuleType | None:
    """The module `flash_call`, where there is `tiled_kernel`."""
    return _kernels("flash_call") if _has_vectors() else None


def _has_vectors() -> bool:
    """Whether the processor has AVX-512; not on AMD's, where XLA's matmuls were measured, and ours not."""
    try:
        from llvmlite import binding
    except (ImportError, OSError):
        return False  # of a numba that is installed but fails, `step_kernels` warns
    is_measured = not binding.get_host_cpu_name().startswith("znver")
    return is_measured and bool(binding.get_host_cpu_features().get("avx512f"))


@cache
def _kernels(module: str) -> ModuleType | None:
    """To import them takes seconds where numba has no cache of what it compiled."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module(f"llama_jax.numerics.cpu.{module}")
    except (ImportError, OSError, RuntimeError) as error:
        # no numba for this numpy, or nowhere to keep what it compiles
        warnings.warn(f"matmuls are slower than they could be: numba: {error}", stacklevel=3)
        return None
