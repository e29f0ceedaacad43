"""The inner loops of 4-bit codes times one row of x, in integers, where the processor has VNNI.

A vector of codes is 64 bytes of a row, whose low and high bits are the first and the second half of their
groups. x is split into three digits of 8 bits: 24 bits of the largest of the 8 columns that 4 bytes have
codes for. Sums of codes times digits are exact, and all add up in one int32 for each 4 bytes.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_jax.numerics.cpu.block import AHEAD, FEATURES, cases
from llama_jax.numerics.cpu.machine import pointer

_WORD, _INDEX, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_INTEGERS, _FLOATS = ir.VectorType(_INDEX, 16), ir.VectorType(_FLOAT, 16)
_ANY_ORDER = ("reassoc", "contract", "nsz")
_DIGITS = 3
# columns of a group: of these, 64 bytes are complete groups
SIZES = (32, 64, 128)
HAS_VNNI = bool(binding.get_host_cpu_features().get("avx512vnni"))

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
    values = carray(pointer(x), (groups, 2, half), np.float32)
    totals = carray(pointer(sums), (groups,), np.float32)
    vectors = (depth // 2 + _BYTES - 1) // _BYTES
    parts = carray(pointer(digits), (vectors, VECTOR_BYTES), np.int8)
    firsts = carray(pointer(digits), (vectors, VECTOR_BYTES // 4), np.int32)
    scales = carray(pointer(digits), (vectors, VECTOR_BYTES // 4), np.float32)
    lanes = _DIGIT_BYTES // 4
    for group in range(groups):
        total = np.float32(0)
        for which in range(2):
            for column in range(half):
                total += values[group, which, column]
        totals[group] = total
        for column in range(0, half, 4):
            largest, is_finite = np.float32(0), True
            for which in range(2):
                for i in range(4):
                    size_of_value = abs(values[group, which, column + i])
                    is_finite = is_finite and size_of_value < np.inf
                    largest = max(largest, size_of_value)
            scale, factor = np.float32(np.nan), 0.0  # NaN times 0
            if is_finite:
                scale = max(largest / _LARGEST, _LEAST_SCALE)
                factor = 1 / np.float64(scale)
            place = group * half + column
            vector, byte = place // _BYTES, place % _BYTES
            first = 0
            for which in range(2):
                for i in range(4):
                    value = values[group, which, column + i] if is_finite else np.float32(0)
                    number = int(np.rint(value * factor))
                    first += number
                    low = ((number + 128) & 255) - 128
                    number = (number - low) >> 8
                    middle = ((number + 128) & 255) - 128
                    at = which * _BYTES + byte + i
                    parts[vector, at] = (number - middle) >> 8
                    parts[vector, at + 2 * _BYTES] = middle
                    parts[vector, at + 4 * _BYTES] = low
            # codes are stored as 8 more than they are
            firsts[vector, lanes + byte // 4] = -8 * first
            scales[vector, lanes + 16 + byte // 4] = scale


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
                builder.store(self._sum(builder.load(total)), self._pointer(place, _FLOAT), align=4)

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
        kind = ir.FunctionType(_INTEGERS, [_INTEGERS] * 3)
        return self._call("llvm.x86.avx512.vpdpbusd.512", kind, [total, codes, digits])

    def _sum(self, vector: Any) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        name = "llvm.vector.reduce.fadd.v16f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [_FLOAT(0.0), vector], fastmath=_ANY_ORDER)

    def _fetch(self, place: Any) -> None:
        """Into the cache what comes later."""
        address = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, _INDEX, _INDEX, _INDEX])
        later = self.builder.inttoptr(self.builder.add(place, _WORD(AHEAD)), address)
        self._call("llvm.prefetch.p0", kind, [later, _INDEX(0), _INDEX(3), _INDEX(1)])

    def _load(self, place: Any, kind: Any, count: Any) -> Any:
        """The first `count` elements, or all; others are 0."""
        builder, width = self.builder, kind.count
        where = self._pointer(place, kind)
        if count is None or width == 1:
            return builder.load(where, align=1)
        bools = ir.VectorType(ir.IntType(1), width)
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
        function = ir.FunctionType(kind, [where.type, _INDEX, bools, kind])
        return self._call(name, function, [where, _INDEX(1), mask, ir.Constant(kind, None)])

    def _call(self, name: str, kind: Any, arguments: list[Any]) -> Any:
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    def _at(self, address: Any, index: Any, size: int) -> Any:
        return self.builder.add(address, self.builder.mul(index, _WORD(size)))

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())
