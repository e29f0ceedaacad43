"""The inner loops of 4-bit codes times one row of x, in integers, where the processor has VNNI.

A vector of codes is 64 bytes of a row, whose low and high bits are the first and the second half of their
groups. x is split into three digits of 8 bits: 24 bits of the largest of the 8 columns that 4 bytes have
codes for. Sums of codes times digits are exact, and all add up in one int32 for each 4 bytes.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_jax.numerics.cpu.block import AHEAD, FEATURES, cases
from llama_jax.numerics.cpu.machine import pointer
from llama_jax.numerics.cpu.processor import HAS_VNNI

_WORD, _INDEX, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_INTEGERS, _FLOATS = ir.VectorType(_INDEX, 16), ir.VectorType(_FLOAT, 16)
_DOUBLES = ir.VectorType(ir.DoubleType(), 16)
_ANY_ORDER = ("reassoc", "contract", "nsz")
_DIGITS = 3
# columns of a group: of these, 64 bytes are complete groups
SIZES = (32, 64, 128)

_BYTES = 64  # of a vector
# what is kept of x for each vector: digits of both halves, and for each lane the first sum and the scale
_DIGIT_BYTES = 2 * _DIGITS * _BYTES
VECTOR_BYTES = _DIGIT_BYTES + 2 * _BYTES
_LARGEST = np.float32(127 * 2**16)  # of the integers for x
_LEAST_SCALE = np.finfo(np.float32).tiny


class Operands(NamedTuple):
    """Of a matmul, as int64: addresses and sizes."""

    codes: Any  # uint8 [features, depth / 2]
    digits: Any  # of x, see `split`
    scale: Any  # float32 [features, groups]
    zero: Any  # float32 [features, groups]
    sums: Any  # of x over groups, float32 [groups]
    out: Any  # float32 [features]
    depth: Any
    groups: Any


@njit(error_model="numpy")
def split(x: int, digits: int, sums: int, depth: int, groups: int) -> None:
    """Write `VECTOR_BYTES` for each vector at `digits`, which are zeros before, and the sums at `sums`."""
    size = depth // groups
    half = size // 2
    totals = carray(pointer(sums), (groups,), np.float32)
    for index in range(groups):
        totals[index] = 0
    for column in range(0, depth // 2, 16):
        group, byte = column // half, column % _BYTES
        place = x + (group * size + column % half) * 4
        target = digits + column // _BYTES * VECTOR_BYTES
        totals[group] += _split_columns(
            place, place + half * 4, target + byte, target + _DIGIT_BYTES + byte
        )


@intrinsic
def _split_columns(_: Any, low: Any, high: Any, digits: Any, lanes: Any) -> Any:
    """Of 16 columns at `low` and `high` each, as `split` has them; their sum.

    Digits and lanes of four columns each, what is kept of them, are written from these addresses on.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *places, digits, lanes = arguments
        halves = [_vector_at(builder, place) for place in places]
        sizes = [_call(builder, "llvm.fabs.v16f32", _FLOATS, half) for half in halves]
        infinity = ir.Constant(_FLOATS, [float("inf")] * 16)
        is_finite = builder.and_(*(builder.fcmp_ordered("<", size, infinity) for size in sizes))
        is_larger = builder.fcmp_ordered(">", *sizes)
        largest = _of_fours(
            builder,
            builder.select(is_larger, *sizes),
            lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b),
        )
        is_finite = _of_fours(builder, is_finite, builder.and_)
        scale = builder.fdiv(largest, ir.Constant(_FLOATS, [float(_LARGEST)] * 16))
        least = ir.Constant(_FLOATS, [float(_LEAST_SCALE)] * 16)
        scale = builder.select(builder.fcmp_ordered(">", scale, least), scale, least)
        one = ir.Constant(_DOUBLES, [1.0] * 16)
        factor = builder.fdiv(one, builder.fpext(scale, _DOUBLES))
        not_a_number = ir.Constant(_FLOATS, [float("nan")] * 16)  # times 0
        scale = builder.select(is_finite, scale, not_a_number)
        numbers = []
        for half in halves:
            value = builder.select(is_finite, half, ir.Constant(_FLOATS, None))
            value = builder.fmul(builder.fpext(value, _DOUBLES), factor)
            value = _call(builder, "llvm.rint.v16f64", _DOUBLES, value)
            numbers.append(builder.fptosi(value, _INTEGERS))
        # codes are stored as 8 more than they are
        first = _of_fours(builder, builder.add(*numbers), builder.add)
        first = builder.mul(first, ir.Constant(_INTEGERS, [-8] * 16))
        for which, number in enumerate(numbers):
            for digit in reversed(range(_DIGITS)):
                part = number
                if digit > 0:  # the lowest 8 bits, from -128 to 127; the rest is divisible by 256
                    part = builder.shl(part, ir.Constant(_INTEGERS, [24] * 16))
                    part = builder.ashr(part, ir.Constant(_INTEGERS, [24] * 16))
                    number = builder.sub(number, part)
                    number = builder.ashr(number, ir.Constant(_INTEGERS, [8] * 16))
                target = builder.add(digits, _WORD((2 * digit + which) * _BYTES))
                part = builder.trunc(part, ir.VectorType(ir.IntType(8), 16))
                builder.store(part, builder.inttoptr(target, part.type.as_pointer()), align=1)
        fours = ir.Constant(ir.VectorType(_INDEX, 4), [0, 4, 8, 12])
        for offset, kept in ((0, first), (_BYTES, scale)):
            of_lanes = builder.shuffle_vector(kept, ir.Constant(kept.type, ir.Undefined), fours)
            target = builder.inttoptr(builder.add(lanes, _WORD(offset)), of_lanes.type.as_pointer())
            builder.store(of_lanes, target, align=1)
        return _sum(builder, builder.fadd(*halves))

    return types.float32(types.int64, types.int64, types.int64, types.int64), emit


def _of_fours(builder: Any, vector: Any, combine: Any) -> Any:
    """Each lane becomes what `combine` makes of its four lanes."""
    for distance in (1, 2):
        others = ir.Constant(_INTEGERS, [lane ^ distance for lane in range(16)])
        other = builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), others)
        vector = combine(vector, other)
    return vector


def _vector_at(builder: Any, place: Any) -> Any:
    return builder.load(builder.inttoptr(place, _FLOATS.as_pointer()), align=4)


def _sum(builder: Any, vector: Any) -> Any:
    name = "llvm.vector.reduce.fadd.v16f32"
    return _call(builder, name, _FLOAT, _FLOAT(0.0), vector, fastmath=_ANY_ORDER)


def _call(builder: Any, name: str, result: Any, *arguments: Any, fastmath: Any = ()) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=fastmath)


@intrinsic
def multiply_digits(_: Any, operands: Any, begin: Any, end: Any) -> Any:
    """Compute out[begin:end] of (operands, begin, end)."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not HAS_VNNI:  # not called
            return context.get_dummy_value()
        of = Operands(*cgutils.unpack_tuple(builder, arguments[0]))
        size = builder.sdiv(of.depth, of.groups)
        for known in cases(builder, size, SIZES):
            if isinstance(known, ir.Constant):
                _Rows(builder, of, known.constant).emit(*arguments[1:])
        return context.get_dummy_value()

    return types.void(operands, begin, end), emit


class _Rows:
    """A loop over `FEATURES` rows of the weight at a time, in groups of `size` columns."""

    def __init__(self, builder: Any, of: Operands, size: int):
        self.builder, self.of = builder, of
        self.groups = 2 * _BYTES // size  # of a vector

    def emit(self, begin: Any, end: Any) -> None:
        builder, of = self.builder, self.of
        last = builder.sub(end, _WORD(1))
        row_bytes = builder.sdiv(of.depth, _WORD(2))
        vectors = builder.sdiv(row_bytes, _WORD(_BYTES))
        rest = builder.srem(row_bytes, _WORD(_BYTES))
        complete = builder.and_(of.groups, _WORD(-16))
        with cgutils.for_range_slice(builder, begin, end, _WORD(FEATURES)) as (feature, _):
            features = []
            for i in range(FEATURES):  # fewer repeat the last one
                row = builder.add(feature, _WORD(i))
                features.append(builder.select(builder.icmp_signed("<", row, last), row, last))
            totals = [cgutils.alloca_once(builder, _FLOATS) for _ in features]
            for total in totals:
                builder.store(ir.Constant(_FLOATS, None), total)
            with cgutils.for_range(builder, vectors) as loop:
                self._vector(features, totals, loop.index, row_bytes, None)
            with builder.if_then(builder.icmp_signed(">", rest, _WORD(0))):
                self._vector(features, totals, vectors, row_bytes, rest)
            with cgutils.for_range_slice(builder, _WORD(0), complete, _WORD(16)) as (group, _):
                self._zeros(features, totals, group, None)
            left = builder.sub(of.groups, complete)
            with builder.if_then(builder.icmp_signed(">", left, _WORD(0))):
                self._zeros(features, totals, complete, left)
            for row, total in zip(features, totals, strict=True):
                place = self._at(of.out, row, 4)
                builder.store(
                    _sum(builder, builder.load(total)), self._pointer(place, _FLOAT), align=4
                )

    def _vector(
        self, features: list[Any], totals: list[Any], index: Any, row_bytes: Any, rest: Any
    ) -> None:
        """A vector of each row, of which only `rest` bytes are there unless it is None."""
        builder, of = self.builder, self.of
        digits = self._at(of.digits, index, VECTOR_BYTES)
        x = [
            self._load(builder.add(digits, _WORD(_BYTES * i)), _INTEGERS, None)
            for i in range(2 * _DIGITS)
        ]
        first = self._load(builder.add(digits, _WORD(_DIGIT_BYTES)), _INTEGERS, None)
        of_x = self._load(builder.add(digits, _WORD(_DIGIT_BYTES + _BYTES)), _FLOATS, None)
        lanes = groups = None
        if rest is not None:
            lanes = builder.sdiv(rest, _WORD(4))
            groups = builder.sdiv(builder.mul(rest, _WORD(self.groups)), _WORD(_BYTES))
        low_bits = ir.Constant(_INTEGERS, [0x0F0F0F0F] * 16)
        for row, total in zip(features, totals, strict=True):
            place = builder.add(builder.mul(row, row_bytes), builder.mul(index, _WORD(_BYTES)))
            place = builder.add(of.codes, place)
            self._fetch(place)
            codes = self._load(place, _INTEGERS, lanes)
            high = builder.lshr(codes, ir.Constant(_INTEGERS, [4] * 16))
            halves = [builder.and_(part, low_bits) for part in (codes, high)]
            number = None
            for digit in range(_DIGITS):
                part = first if digit == _DIGITS - 1 else ir.Constant(_INTEGERS, None)
                for which, codes in enumerate(halves):
                    part = self._dot(part, codes, x[2 * digit + which])
                if number is not None:
                    number = builder.shl(number, ir.Constant(_INTEGERS, [8] * 16))
                    part = builder.add(number, part)
                number = part
            group = builder.add(builder.mul(row, of.groups), builder.mul(index, _WORD(self.groups)))
            scale = self._load(
                self._at(of.scale, group, 4), ir.VectorType(_FLOAT, self.groups), groups
            )
            spread = [lane * self.groups // 16 for lane in range(16)]
            undefined = ir.Constant(scale.type, ir.Undefined)
            scale = builder.shuffle_vector(scale, undefined, ir.Constant(_INTEGERS, spread))
            scale = builder.fmul(scale, of_x, flags=_ANY_ORDER)
            self._add(total, builder.sitofp(number, _FLOATS), scale)

    def _zeros(self, features: list[Any], totals: list[Any], group: Any, count: Any) -> None:
        """Zeros of 16 groups times sums of x, or of `count`."""
        builder, of = self.builder, self.of
        sums = self._load(self._at(of.sums, group, 4), _FLOATS, count)
        for row, total in zip(features, totals, strict=True):
            place = builder.add(builder.mul(row, of.groups), group)
            self._add(total, self._load(self._at(of.zero, place, 4), _FLOATS, count), sums)

    def _add(self, variable: Any, first: Any, second: Any) -> None:
        product = self.builder.fmul(first, second, flags=_ANY_ORDER)
        total = self.builder.fadd(self.builder.load(variable), product, flags=_ANY_ORDER)
        self.builder.store(total, variable)

    def _dot(self, total: Any, codes: Any, digits: Any) -> Any:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return _call(self.builder, name, _INTEGERS, total, codes, digits)

    def _fetch(self, place: Any) -> None:
        """Into the cache what comes later."""
        later = self._pointer(self.builder.add(place, _WORD(AHEAD)), ir.IntType(8))
        how = _INDEX(0), _INDEX(3), _INDEX(1)  # to read, into all caches, data
        _call(self.builder, "llvm.prefetch.p0", ir.VoidType(), later, *how)

    def _load(self, place: Any, kind: Any, count: Any) -> Any:
        """The first `count` elements, or all; others are 0."""
        builder, width = self.builder, kind.count
        where = self._pointer(place, kind)
        if count is None or width == 1:
            return builder.load(where, align=1)
        many = builder.insert_element(
            ir.Constant(ir.VectorType(_WORD, width), ir.Undefined), count, _INDEX(0)
        )
        many = builder.shuffle_vector(
            many,
            ir.Constant(many.type, ir.Undefined),
            ir.Constant(ir.VectorType(_INDEX, width), None),
        )
        numbers = ir.Constant(many.type, list(range(width)))
        mask = builder.icmp_signed("<", numbers, many)
        element = "f32" if kind.element == _FLOAT else "i32"
        name = f"llvm.masked.load.v{width}{element}.p0"
        return _call(builder, name, kind, where, _INDEX(1), mask, ir.Constant(kind, None))

    def _at(self, address: Any, index: Any, size: int) -> Any:
        return self.builder.add(address, self.builder.mul(index, _WORD(size)))

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())
