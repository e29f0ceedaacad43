"""The machine code of the kernels, kept in a file, so that a process need not import numba to call them.

numba keeps it too, but to read it there takes most of a second, of which numba's imports are the larger
part. A file has what numba compiled of one module, and is for one kind of processor; it is read only if it
is complete and of the same sources and versions, and otherwise written anew.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import llvmlite
from llvmlite import binding

_SUM_BYTES = 32
_SYMBOL = "<IBBHQQ"  # of ELF: name, info, other, section, value, size

# Of numba's runtime, what it calls to raise an exception of Python and to free an array that it allocated;
# the kernels do neither. One that needs more of it is not kept.
_NEVER_CALLED = (
    *(
        "NRT_Free",
        "NRT_MemInfo_call_dtor",
        "numba_do_raise",
        "numba_gil_ensure",
        "numba_gil_release",
    ),
    *("numba_runtime_build_excinfo_struct", "numba_unpickle"),
)

_engines: list[Any] = []  # for as long as the process: XLA has addresses of their code


def register(module: str, targets: Mapping[str, str]) -> None:
    """Let XLA call functions of a module.

    Args:
        module: of this package, with `FUNCTIONS`, functions of numba by symbol, which may call those before
            them by that symbol, and `MEMORY`, sizes of memory by symbol.
        targets: names of XLA's targets, and which functions they are.

    Raises:
        ImportError, OSError, RuntimeError: of numba.
    """
    places = _addresses(module)
    for target, function in targets.items():
        handler = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(places[function])
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")


def _addresses(module: str) -> dict[str, int]:
    """Those of a module's `FUNCTIONS`."""
    path, key = _place(module)
    with suppress(OSError, ValueError):
        return _load(path.read_bytes(), key)
    compiled = importlib.import_module(f"llama_jax.numerics.cpu.{module}")
    # inner parts of numba that another version may not have, or nowhere to write: without a file, then
    with suppress(Exception):
        _write(path, _packed(compiled, key))
    return {name: function.address for name, function in compiled.FUNCTIONS.items()}


def lasting_zeros(size: int) -> int:
    """The address of so many bytes, which are never freed: threads may outlive Python's objects."""
    calloc = ctypes.CDLL(None).calloc
    calloc.restype, calloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t, ctypes.c_size_t)
    address: int = calloc(1, size)
    return address


def _place(module: str) -> tuple[Path, str]:
    """The file, and what it has to be of."""
    features = sorted(binding.get_host_cpu_features().items())
    settings = {name: os.environ[name] for name in os.environ if name.startswith("NUMBA_")}
    processor = json.dumps([binding.get_host_cpu_name(), features, settings], sort_keys=True)
    folder = Path(__file__).parent
    sources = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    versions = [version("numba"), llvmlite.__version__, sys.version]
    of = [hashlib.sha256(source).hexdigest() for source in sources]
    key = hashlib.sha256(json.dumps([processor, versions, of]).encode()).hexdigest()
    machine = hashlib.sha256(processor.encode()).hexdigest()[:8]
    # with Python's bytecode
    cache = Path(importlib.util.cache_from_source(__file__)).parent
    return cache / f"{module}-{machine}.objects", key


def _load(data: bytes, key: str) -> dict[str, int]:
    """Raises ValueError if `data` is damaged or of something else."""
    if hashlib.sha256(data[_SUM_BYTES:]).digest() != data[:_SUM_BYTES]:
        raise ValueError("damaged")
    end = data.index(b"\n", _SUM_BYTES)
    header = json.loads(data[_SUM_BYTES:end])
    if header["key"] != key:
        raise ValueError("of something else")
    for symbol, size in header["memory"].items():
        binding.add_symbol(symbol, lasting_zeros(size))
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    found = {}
    begin = end + 1
    for symbol, native, size, undefined in header["functions"]:
        for missing in undefined:
            if binding.address_of_symbol(missing) is None:
                binding.add_symbol(missing, _address_in_process(missing))
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(data[begin : begin + size]))
        engine.finalize_object()
        _engines.append(engine)
        begin += size
        found[symbol] = engine.get_function_address(native)
        binding.add_symbol(symbol, found[symbol])
    return found


def _address_in_process(symbol: str) -> int:
    """The address of a function of C or Python; what only numba has ends the process."""
    process = ctypes.CDLL(None)
    function = getattr(process, symbol, process.abort)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _packed(compiled: Any, key: str) -> bytes:
    """The file of a module that was compiled."""
    functions, objects = [], []
    for symbol, function in compiled.FUNCTIONS.items():
        code = _object_of(function)
        undefined = _undefined_symbols(code)
        known = {*compiled.FUNCTIONS, *compiled.MEMORY, *_NEVER_CALLED}
        if needed := [name for name in undefined if name not in known and not _is_found(name)]:
            raise ValueError(f"{symbol} needs numba for {', '.join(needed)}")
        functions.append((symbol, function.native_name, len(code), undefined))
        objects.append(code)
    header = {"key": key, "memory": compiled.MEMORY, "functions": functions}
    data = json.dumps(header).encode() + b"\n" + b"".join(objects)
    return hashlib.sha256(data).digest() + data


def _object_of(function: Any) -> bytes:
    """The object file of one of numba's C functions, out of its cache."""
    cache = function._cache
    index_key = cache._index_key(function._sig, function._targetdescr.target_context.codegen())
    library, *_ = cache._cache_file.load(index_key)
    _, kind, (code, _) = library
    assert kind == "object"
    return bytes(code)


def _undefined_symbols(code: bytes) -> list[str]:
    """The names that an object file of ELF does not define."""
    sections = {
        section.name(): section.data()
        for section in binding.ObjectFileRef.from_data(code).sections()
    }
    names = sections[b".strtab"]
    undefined = [
        names[name : names.index(b"\0", name)].decode()
        for name, _, _, section, _, _ in struct.iter_unpack(_SYMBOL, sections[b".symtab"])
        if name and not section
    ]
    return sorted(undefined)


def _is_found(symbol: str) -> bool:
    return hasattr(ctypes.CDLL(None), symbol)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)
