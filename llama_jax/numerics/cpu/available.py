"""Whether a program may use the kernels, in a module that does not import numba."""

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType

import jax

from llama_jax.numerics.backend import target_platform


def cpu_kernels() -> ModuleType | None:
    """The module `call`, if this program is for one CPU and numba is installed (extra `cpu`)."""
    is_one = jax.sharding.get_abstract_mesh().empty
    return _kernels() if is_one and target_platform() == "cpu" else None


@cache
def _kernels() -> ModuleType | None:
    """To import them takes seconds where numba has no cache of what it compiled."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("llama_jax.numerics.cpu.call")
    except (ImportError, OSError, RuntimeError) as error:
        # no numba for this numpy, or nowhere to keep what it compiles
        warnings.warn(f"decoding is slower than it could be: numba: {error}", stacklevel=3)
        return None
