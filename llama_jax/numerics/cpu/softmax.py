"""Rows of attention scores to weights, in LLVM's vectors: numba calls `exp` for one value at a time.

A row is in pieces of `PIECE` float32, at a distance in bytes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_jax.numerics.cpu import vectors
from llama_jax.numerics.cpu.vectors import (
    BITS_VECTOR,
    FLOAT_VECTOR,
    LANES,
    WORD,
    constant,
    fma,
    load,
    splat,
    store,
)

PIECE = 64
_PARTS = PIECE // LANES

_LOG2_E = 1 / math.log(2)
# log(2) in two parts, the first with so few bits that its product with an exponent is exact
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH
# Added to a number, it leaves the integer next to it, plus the bias of an exponent, in the lowest bits.
_ROUND = 1.5 * 2**23
_BIAS = 127
_LEAST = -87.0  # whose exponential is still a normal number; what is less becomes 0
_COEFFICIENTS = [1 / math.factorial(power) for power in range(8)]


def _exp(builder: Any, x: Any) -> Any:
    """e^x for x up to 0: 2^n e^r with |r| up to log(2) / 2. NaN stays."""
    biased = fma(builder, x, constant(_LOG2_E), constant(_ROUND + _BIAS))
    number = builder.fsub(biased, constant(_ROUND + _BIAS))
    rest = fma(builder, number, constant(-_LN2_HIGH), x)
    rest = fma(builder, number, constant(-_LN2_LOW), rest)
    power = constant(_COEFFICIENTS[-1])
    for coefficient in _COEFFICIENTS[-2::-1]:
        power = fma(builder, power, rest, constant(coefficient))
    bits = builder.bitcast(biased, BITS_VECTOR)
    exponent = builder.shl(bits, ir.Constant(BITS_VECTOR, [23] * LANES))
    power = builder.fmul(power, builder.bitcast(exponent, FLOAT_VECTOR))
    is_small = builder.fcmp_ordered("<", x, constant(_LEAST))
    return builder.select(is_small, constant(0), power)


@contextmanager
def _pieces(builder: Any, row: Any, count: Any, distance: Any) -> Iterator[list[Any]]:
    """A loop over the pieces of a row; the addresses of the vectors of one."""
    with cgutils.for_range(builder, count) as loop:
        first = builder.add(row, builder.mul(loop.index, distance))
        yield [builder.add(first, WORD(part * LANES * 4)) for part in range(_PARTS)]


def _variables(builder: Any, value: Any) -> list[Any]:
    """One for each vector of a piece."""
    variables = [cgutils.alloca_once(builder, FLOAT_VECTOR) for _ in range(_PARTS)]
    for variable in variables:
        builder.store(value, variable)
    return variables


@intrinsic
def row_maximum(_: Any, row: Any, count: Any, distance: Any) -> Any:
    """The largest of `count` pieces."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        largest = _variables(builder, constant(-math.inf))
        with _pieces(builder, *arguments) as places:
            for variable, place in zip(largest, places, strict=True):
                old, new = builder.load(variable), load(builder, place)
                is_larger = builder.fcmp_ordered(">", new, old)
                builder.store(builder.select(is_larger, new, old), variable)
        result = builder.load(largest[0])
        for variable in largest[1:]:
            new = builder.load(variable)
            result = builder.select(builder.fcmp_ordered(">", new, result), new, result)
        return vectors.largest_lane(builder, result)

    return types.float32(types.int64, types.int64, types.int64), emit


@intrinsic
def exponentials(_: Any, row: Any, count: Any, distance: Any, scale: Any, shift: Any) -> Any:
    """Replace every x of `count` pieces by exp(scale x - shift); their sum. -inf becomes 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *row, scale, shift = arguments
        factor, less = splat(builder, scale), builder.fneg(splat(builder, shift))
        sums = _variables(builder, constant(0))
        with _pieces(builder, *row) as places:
            for variable, place in zip(sums, places, strict=True):
                weight = _exp(builder, fma(builder, load(builder, place), factor, less))
                store(builder, weight, place)
                builder.store(builder.fadd(builder.load(variable), weight), variable)
        first, second, third, fourth = map(builder.load, sums)
        total = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
        return vectors.sum_of_lanes(builder, total)

    signature = types.float32(types.int64, types.int64, types.int64, types.float32, types.float32)
    return signature, emit


@intrinsic
def gradients_of_scores(
    _: Any, scores: Any, gradients: Any, scale: Any, row_max: Any, delta: Any
) -> Any:
    """Of a piece: replace scores x by weights w = exp(scale x - row_max), and their gradients g by those of
    the scores, w (g - delta) scale. -inf becomes a weight of 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, gradients, *numbers = arguments
        factor, shift, less = (splat(builder, number) for number in numbers)
        shift = builder.fneg(shift)
        for part in range(_PARTS):
            offset = WORD(part * LANES * 4)
            place, of_gradient = builder.add(scores, offset), builder.add(gradients, offset)
            weight = _exp(builder, fma(builder, load(builder, place), factor, shift))
            gradient = builder.fsub(load(builder, of_gradient), less)
            gradient = builder.fmul(builder.fmul(weight, gradient), factor)
            store(builder, weight, place)
            store(builder, gradient, of_gradient)
        return context.get_dummy_value()

    numbers = types.float32, types.float32, types.float32
    return types.void(types.int64, types.int64, *numbers), emit
