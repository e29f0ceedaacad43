"""LLVM's vectors of 16 float32 in numba's functions; addresses are int64."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16

WORD, BITS, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
BITS_VECTOR, FLOAT_VECTOR = (ir.VectorType(of, LANES) for of in (BITS, FLOAT))


def load(builder: Any, address: Any, kind: Any = FLOAT_VECTOR) -> Any:
    """What is at an address, of any alignment of 2 bytes."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def store(builder: Any, value: Any, address: Any) -> None:
    """Put a value at an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)


def splat(builder: Any, value: Any) -> Any:
    """A vector of one value."""
    undefined = ir.Constant(FLOAT_VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, value, BITS(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(BITS_VECTOR, None))


def constant(value: float) -> Any:
    """A vector of one number."""
    return ir.Constant(FLOAT_VECTOR, [value] * LANES)


def fma(builder: Any, first: Any, second: Any, total: Any) -> Any:
    """first * second + total, rounded once."""
    return _call(builder, f"llvm.fma.v{LANES}f32", FLOAT_VECTOR, first, second, total)


def largest_lane(builder: Any, vector: Any) -> Any:
    """The largest of a vector's values."""
    return _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, vector)


def sum_of_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector's values, of halves first."""
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    return _call(builder, name, FLOAT, FLOAT(-0.0), vector, fastmath=("reassoc",))


def _call(builder: Any, name: str, result: Any, *arguments: Any, fastmath: Any = ()) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=fastmath)
