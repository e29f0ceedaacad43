"""Which kernels a program may use, in a module that does not import numba."""

import importlib
import importlib.util
import sys
import warnings
from functools import cache
from types import ModuleType

import jax

from llama_jax.numerics.backend import target_platform

_PACKAGE = "llama_jax.numerics.cpu"
_MODULES = "call", "tiled_call", "flash_call", "flash_backward_call"


def step_kernels() -> ModuleType | None:
    """The module `call`, if this program is for one CPU and numba is installed (extra `cpu`)."""
    is_one = jax.sharding.get_abstract_mesh().empty
    return _kernels("call") if is_one and target_platform() == "cpu" else None


@cache
def tiled_kernel() -> ModuleType | None:
    """The module `tiled_call`, if numba is installed and the processor has the registers that it needs.

    On AMD's processors XLA's matmuls were measured, and this was not.
    """
    processor = _processor_with_avx512()
    is_measured = processor is not None and not processor.startswith("znver")
    return _kernels("tiled_call") if is_measured else None


@cache
def may_have_flash_kernel() -> bool:
    """Whether numba is installed and the processor has the registers that it needs.

    This compiles nothing, since a forward pass is traced for training, too, which calls another program.
    """
    return importlib.util.find_spec("numba") is not None and _processor_with_avx512() is not None


def flash_kernel() -> ModuleType | None:
    """The module `flash_call`, where `may_have_flash_kernel` and numba works."""
    return _kernels("flash_call")


def flash_backward_kernel() -> ModuleType | None:
    """The module `flash_backward_call`, as `flash_kernel`."""
    return _kernels("flash_backward_call")


def loaded_kernels() -> list[str]:
    """Names of the kernels that a program compiled by now may call."""
    return [name for name in _MODULES if f"{_PACKAGE}.{name}" in sys.modules]


def load_kernel(name: str) -> bool:
    """Let XLA call one of `loaded_kernels`, in another process than theirs; False if it does not work."""
    return _kernels(name) is not None


def _processor_with_avx512() -> str | None:
    """LLVM's name for this one; None without AVX-512 or numba."""
    try:
        from llvmlite import binding
    except (ImportError, OSError):
        return None  # of a numba that is installed but fails, `step_kernels` warns
    name: str = binding.get_host_cpu_name()
    return name if binding.get_host_cpu_features().get("avx512f") else None


@cache
def _kernels(module: str) -> ModuleType | None:
    """To import them takes seconds where no process has compiled them."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module(f"{_PACKAGE}.{module}")
    except (ImportError, OSError, RuntimeError) as error:
        # no numba for this numpy, for example
        warnings.warn(f"matmuls are slower than they could be: numba: {error}", stacklevel=3)
        return None
