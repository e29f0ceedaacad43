"""What functions compiled by numba need to be called by XLA: addresses, an atomic sum, bits of floats.

Addresses are int64.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

TASK = "llama_jax_few_rows_task"  # symbol of the function that `task_address` returns

_POINTER = ir.IntType(8).as_pointer()

malloc = types.ExternalFunction("malloc", types.int64(types.int64))
free = types.ExternalFunction("free", types.void(types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def pointer(_: Any, address: Any) -> Any:
    """The address as a pointer, for `numba.carray`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _POINTER)

    return types.voidptr(types.int64), emit


@intrinsic
def fetch_add(_: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at the address, atomically; what was there."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def call(_: Any, function: Any, argument: Any) -> Any:
    """Call the function at an address with one address; the address that it returns."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), [arguments[1]])

    return types.int64(types.int64, types.int64), emit


@intrinsic
def task_address(_: Any) -> Any:
    """The address of the symbol `TASK`; a number would not be true in the next process."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        function = builder.module.globals.get(TASK)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [word]), TASK)
        return builder.ptrtoint(function, word)

    return types.int64(), emit


@intrinsic
def float_of_bfloat16(_: Any, bits: Any) -> Any:
    """The float32 whose first 16 bits are these."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        wide = builder.shl(builder.zext(arguments[0], word), word(16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), emit


# numba would compute these with int64, which halves the speed at least.


@intrinsic
def float_of_low_code(_: Any, codes: Any) -> Any:
    """The code from -8 to 7 in the low 4 bits, stored as 0 to 15."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _centered(builder, builder.and_(arguments[0], ir.IntType(8)(15)))

    return types.float32(types.uint8), emit


@intrinsic
def float_of_high_code(_: Any, codes: Any) -> Any:
    """The code in the high 4 bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _centered(builder, builder.lshr(arguments[0], ir.IntType(8)(4)))

    return types.float32(types.uint8), emit


def _centered(builder: Any, code: Any) -> Any:
    # 8 times a sum, taken off afterwards, would round 2.5 times as much
    return builder.sitofp(builder.sub(code, ir.IntType(8)(8)), ir.FloatType())
