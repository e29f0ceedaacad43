"""What functions compiled by numba need to be called by XLA: addresses and atomic operations.

Addresses are int64.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_WORD = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()

malloc = types.ExternalFunction("malloc", types.int64(types.int64))
calloc = types.ExternalFunction("calloc", types.int64(types.int64, types.int64))
free = types.ExternalFunction("free", types.void(types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """The address as a pointer, for `numba.carray`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _POINTER)

    return types.voidptr(types.int64), emit


@njit(error_model="numpy")  # kept as a part of what calls it
def fill(values: Any, value: Any) -> None:
    """Set them all. `values[:] = value` takes numba a second to compile, for errors that it could raise."""
    for index in range(len(values)):
        values[index] = value


@intrinsic
def load(_: Any, address: Any) -> Any:
    """The int64 at the address, atomically."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word_at(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def fetch_add(_: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at the address, atomically; what was there."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _word_at(builder, arguments[0])
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def exchange(_: Any, address: Any, value: Any) -> Any:
    """Replace the int64 at the address, atomically; what was there."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _word_at(builder, arguments[0])
        return builder.atomic_rmw("xchg", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def compare_exchange(_: Any, address: Any, expected: Any, value: Any) -> Any:
    """Replace the int64 at the address if it is the expected one, atomically; what was there."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _word_at(builder, arguments[0])
        result = builder.cmpxchg(place, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 0)

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def call(_: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with one address; the address that it returns."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

    return types.int64(types.int64, types.int64), emit


def symbol_address(symbol: str) -> Any:
    """An intrinsic; a number would not be true in the next process."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.globals.get(symbol)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [_WORD])
            function = ir.Function(builder.module, kind, symbol)
        return builder.ptrtoint(function, _WORD)

    @intrinsic
    def address(_: Any) -> Any:
        return types.int64(), emit

    return address


def _word_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())
