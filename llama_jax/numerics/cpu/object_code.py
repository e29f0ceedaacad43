"""Kernels as object code, which a process loads without numba, whose import takes most of a second.

numba compiles a kernel where no file has its code. The files are in the user's cache, each with a checksum
and under a digest of all that determines the code. Only this user may write there: the code is executed.
"""

import ctypes
import hashlib
import importlib
import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from llvmlite import binding

from llama_jax.files.user_cache import cache_directory, is_private

_MOST_FILES = 16
_SUM_BYTES = 32
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
    file = _file(module)
    if file is not None and module not in _compiled and (codes := _read(file)) is not None:
        return {symbol: _load(symbol, code) for symbol, code in codes.items()}
    importlib.import_module(f"{__package__}.{module}")
    codes = _compiled[module]
    if file is not None:
        _write(file, codes)
    return {symbol: _engine.get_function_address(symbol) for symbol in codes}


def _file(module: str) -> Path | None:
    """Where the code of a module is kept, or would be; None without a home directory."""
    digest = hashlib.sha256(module.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    chosen = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    facts = version("numba"), version("llvmlite"), *_host(), chosen
    digest.update(repr(facts).encode())
    # a container's root may have the cache of another user, whose code it does not trust
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        return cache_directory("kernels") / f"kernels-{user}" / digest.hexdigest()
    except ValueError:
        return None


def _read(file: Path) -> dict[str, bytes] | None:
    """What `_write` wrote; None if it is not there, or anybody else could have written it."""
    try:
        data = file.read_bytes() if is_private(file.parent) else b""
    except OSError:
        return None
    if hashlib.sha256(data[_SUM_BYTES:]).digest() != data[:_SUM_BYTES]:
        return None
    with suppress(OSError):
        os.utime(file)
    codes: dict[str, bytes] = pickle.loads(data[_SUM_BYTES:])
    return codes


def _write(file: Path, codes: Mapping[str, bytes]) -> None:
    """Nothing is said where that is not possible: the next process compiles it, too."""
    data = pickle.dumps(codes)
    staged = file.with_name(f".{file.name}.{os.getpid()}")  # others may write it at the same time
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            staged.write_bytes(hashlib.sha256(data).digest() + data)
            staged.replace(file)
        finally:
            staged.unlink(missing_ok=True)
        newest_first = sorted(file.parent.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
        for old in newest_first[_MOST_FILES:]:
            old.unlink()


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
