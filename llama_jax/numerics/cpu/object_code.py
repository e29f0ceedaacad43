"""Kernels as object code, which a process loads without numba, whose import takes most of a second.

numba compiles a kernel where no file has its code. The name of a file is a digest of all that determines
the code.
"""

import ctypes
import hashlib
import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from llvmlite import binding

from llama_jax.files.kept_code import read_code, write_code
from llama_jax.files.user_cache import cache_directory

SYMBOLS = "llama_jax_"
"""What all symbols begin with."""

_compiled: dict[str, dict[str, bytes]] = {}
"""Object code by module and symbol, in the order in which it was loaded."""


def register_kernel(module: str, *symbols: str) -> None:
    """Let XLA call functions of a module of this package by their symbols.

    Raises:
        ImportError, RuntimeError: numba is needed, and does not work.
    """
    addresses = _addresses(module)
    for symbol in symbols:
        # of a type that `pycapsule` casts
        capsule = jax.ffi.pycapsule(ctypes.c_void_p(addresses[symbol]))
        jax.ffi.register_ffi_target(symbol, capsule, platform="cpu")


def add_code(module: str, symbol: str, code: bytes) -> None:
    """Load what was compiled of a function of `module`, and keep it for `register_kernel`."""
    _compiled.setdefault(module, {})[symbol] = code
    _load(symbol, code)


def target_machine(triple: str, processor: str, features: str) -> Any:
    """LLVM's, as numba has it."""
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(
        cpu=processor,
        features=features,
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )


def _load(symbol: str, code: bytes) -> int:
    _engine.add_object_file(binding.ObjectFileRef.from_data(code))
    _engine.finalize_object()
    address: int = _engine.get_function_address(symbol)
    binding.add_symbol(symbol, address)  # to which other code may refer
    return address


@cache
def _addresses(module: str) -> Mapping[str, int]:
    name = _file_name(module)
    if module not in _compiled and (codes := _read(name)) is not None:
        return {symbol: _load(symbol, code) for symbol, code in codes.items()}
    importlib.import_module(f"{__package__}.{module}")
    codes = _compiled[module]
    _write(name, codes)
    return {symbol: _engine.get_function_address(symbol) for symbol in codes}


def _file_name(module: str) -> str:
    """A digest of all that determines the code of a module."""
    digest = hashlib.sha256(module.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    chosen = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    digest.update(repr((version("numba"), version("llvmlite"), *_host(), chosen)).encode())
    return digest.hexdigest()


def _folders() -> list[Path]:
    """Where code is kept: in the user's cache or, where that cannot be, beside this package's bytecode."""
    # a container's root may have the cache of another user, whose code it does not trust
    own = f"kernels-{os.getuid()}" if hasattr(os, "getuid") else "kernels"
    folders = [Path(__file__).parent / "__pycache__" / own]
    with suppress(ValueError):  # no home directory
        folders.insert(0, cache_directory("kernels") / own)
    return folders


def _read(name: str) -> dict[str, bytes] | None:
    for folder in _folders():
        with suppress(OSError):
            codes: dict[str, bytes] | None = read_code(folder / name)
            if codes is not None:
                return codes
    return None


def _write(name: str, codes: Mapping[str, bytes]) -> None:
    """Nothing is said where that is not possible: the next process compiles it, too."""
    for folder in _folders():
        with suppress(OSError):
            write_code(folder / name, codes)
            return


def _host() -> tuple[str, str, str]:
    """LLVM's names for this kind of system and processor, and what the processor has."""
    features = binding.get_host_cpu_features().flatten()
    return binding.get_process_triple(), binding.get_host_cpu_name(), features


def _new_engine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine(*_host()))


_engine = _new_engine()
"""What holds the code of this process, for as long as it lives."""
