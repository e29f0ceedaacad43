"""The inner loops of the kernel, written in LLVM's vectors: rows of a weight times rows of x.

numba's own loops use half of a vector register on some processors, and sum up one row of the weight at a
time, whose additions wait for each other. Here several rows are summed at once, and x is read once for
them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_jax.numerics.cpu.processor import HAS_AVX512

_WORD, _INDEX, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
# Sums in any order. NaN and infinity stay what they are.
_ANY_ORDER = ("reassoc", "contract", "nsz")

_WIDTH = 16 if HAS_AVX512 else 8  # floats of a vector; LLVM splits those that no register holds
FEATURES = 4  # rows of a weight in a block, or a multiple of those
_X_ROWS = 4  # of a block, unless x is a single row
# Bytes from what is read to what is fetched meanwhile. The processor does not fetch ahead far enough for
# rows of a few hundred bytes; measured from 1 to 6 KiB, this takes two thirds of the time without it.
AHEAD = 6144
# Columns of a group of 4-bit codes for which there is code without a loop over them. The loop takes a
# third more time with eight rows of x, a sixth more with one.
_SIZES = (32, 64, 128)


class Operands(NamedTuple):
    """Of a matmul, as int64: addresses and sizes."""

    codes: Any  # [features, depth]
    x: Any  # float32 [rows, depth]
    scale: Any  # float32 [features, groups]
    zero: Any  # float32 [features, groups]
    out: Any  # float32 [rows, features]
    rows: Any
    depth: Any
    features: Any
    groups: Any


class _Kind(NamedTuple):
    """A dtype of weights: bits of the integers that hold them, how many each holds, and whether scaled."""

    bits: int
    codes: int
    has_scale: bool
    # a vector of integers to one of float32 for each of their codes; with two codes, by scale and zero
    widen: Callable[..., list[Any]]


def _multiply(kind: _Kind) -> Any:
    """An intrinsic that computes out[:, begin:end] of (operands, begin, end).

    Columns come in groups with a scale. Where an integer holds two codes, the first is of the first half of
    its group, and groups have zeros.
    """
    # rows of the weight in a block of several rows of x: as many as registers hold
    features = FEATURES if HAS_AVX512 else FEATURES // 2

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        operands = Operands(*cgutils.unpack_tuple(builder, arguments[0]))
        is_one = builder.icmp_signed("==", operands.rows, _WORD(1))
        for size in cases(
            builder,
            builder.sdiv(operands.depth, operands.groups),
            _SIZES if kind.codes > 1 else (),
        ):
            blocks = partial(_Blocks, builder, kind, operands, size)
            with builder.if_else(is_one) as (one, more):
                with one:
                    blocks(FEATURES, 1).emit(*arguments[1:])
                with more:
                    blocks(features, _X_ROWS).emit(*arguments[1:])
        return context.get_dummy_value()

    @intrinsic
    def multiply(_: Any, operands: Any, begin: Any, end: Any) -> Any:
        return types.void(operands, begin, end), emit

    return multiply


def cases(builder: Any, size: Any, sizes: tuple[int, ...]) -> Iterator[Any]:
    """`size` as each constant of `sizes`, for code that runs if it is this one, then for all others."""
    if not sizes:
        yield size
        return
    is_this = builder.icmp_signed("==", size, _WORD(sizes[0]))
    with builder.if_else(is_this) as (this, other):
        with this:
            yield _WORD(sizes[0])
        with other:
            yield from cases(builder, size, sizes[1:])


class _Blocks:
    """A loop over blocks of `features` rows of the weight and `rows` of x, in groups of `size` columns."""

    def __init__(
        self,
        builder: Any,
        kind: _Kind,
        operands: Operands,
        size: Any,
        features: int,
        rows: int,
    ):
        self.builder, self.kind, self.of = builder, kind, operands
        self.features, self.rows = features, rows
        self.pairs = [(feature, row) for feature in range(features) for row in range(rows)]
        self.size = size
        self.integers = builder.sdiv(size, _WORD(kind.codes))  # of a group
        self.vectors = builder.and_(self.integers, _WORD(-_WIDTH))  # of these, in complete vectors

    def emit(self, begin: Any, end: Any) -> None:
        rows = self.of.rows
        with (
            cgutils.for_range_slice(self.builder, begin, end, _WORD(self.features)) as (feature, _),
            cgutils.for_range_slice(self.builder, _WORD(0), rows, _WORD(self.rows)) as (row, _),
        ):
            # a block that has fewer rows repeats the last one
            self._block(
                [self._at_most(feature, i, end) for i in range(self.features)],
                [self._at_most(row, i, rows) for i in range(self.rows)],
            )

    def _block(self, features: list[Any], rows: list[Any]) -> None:
        builder, of = self.builder, self.of
        totals = {pair: self._variable(ir.VectorType(_FLOAT, _WIDTH)) for pair in self.pairs}
        scales, zeros = (
            [self._place(array, feature, of.groups, 4) for feature in features]
            for array in (of.scale, of.zero)
        )
        with cgutils.for_range(builder, of.groups) as group:
            if self.kind.codes > 1:
                steps = [
                    [self._float(places[feature], group.index) for places in (scales, zeros)]
                    for feature in range(self.features)
                ]
                self._dot(totals, features, rows, group.index, steps)
            elif self.kind.has_scale:
                parts = {pair: self._variable(ir.VectorType(_FLOAT, _WIDTH)) for pair in self.pairs}
                self._dot(parts, features, rows, group.index)
                for pair, part in parts.items():
                    scale = self._float(scales[pair[0]], group.index)
                    self._add(totals[pair], builder.load(part), self._splat(scale))
            else:
                self._dot(totals, features, rows, group.index)
        for pair in self.pairs:
            feature, row = features[pair[0]], rows[pair[1]]
            place = self._place(self._place(of.out, row, of.features, 4), feature, _WORD(1), 4)
            total = self._sum(builder.load(totals[pair]))
            builder.store(total, self._pointer(place, _FLOAT), align=4)

    def _dot(
        self,
        totals: dict[Any, Any],
        features: list[Any],
        rows: list[Any],
        group: Any,
        steps: list[list[Any]] | None = None,
    ) -> None:
        """Add vectors whose sums are those of weight * x over a group, with scale and zero in `steps`."""
        builder, of, size = self.builder, self.of, self.kind.bits // 8
        row_integers = builder.mul(self.integers, of.groups)
        first = builder.mul(group, self.integers)
        codes = [
            self._place(self._place(of.codes, feature, row_integers, size), first, _WORD(1), size)
            for feature in features
        ]
        first = builder.mul(group, self.size)
        x = [self._place(self._place(of.x, row, of.depth, 4), first, _WORD(1), 4) for row in rows]
        with cgutils.for_range_slice(builder, _WORD(0), self.vectors, _WORD(_WIDTH)) as (column, _):
            self._multiply_columns(totals, codes, x, column, _WIDTH, steps)
        with builder.if_then(builder.icmp_signed("<", self.vectors, self.integers)):
            # of each group summed up first, which rounds less than one long sum
            rest = {pair: self._variable(ir.VectorType(_FLOAT, 1)) for pair in self.pairs}
            with cgutils.for_range_slice(builder, self.vectors, self.integers, _WORD(1)) as (
                column,
                _,
            ):
                self._multiply_columns(rest, codes, x, column, 1, steps)
            for pair, total in totals.items():
                self._add_to_first_lane(total, rest[pair])

    def _multiply_columns(
        self,
        totals: dict[Any, Any],
        codes: list[Any],
        x: list[Any],
        column: Any,
        width: int,
        steps: list[list[Any]] | None,
    ) -> None:
        """Of `width` columns."""
        builder, kind = self.builder, self.kind
        floats, integers = (ir.VectorType(of, width) for of in (_FLOAT, ir.IntType(kind.bits)))
        halves = [builder.mul(self.integers, _WORD(i)) for i in range(kind.codes)]
        columns = [
            [self._load(place, builder.add(column, half), floats, 4) for half in halves]
            for place in x
        ]
        for feature, place in enumerate(codes):
            if width > 1:
                self._fetch(self._place(place, column, _WORD(1), kind.bits // 8))
            loaded = self._load(place, column, integers, kind.bits // 8)
            wide = kind.widen(builder, loaded, *(steps[feature] if steps else ()))
            for row in range(self.rows):
                for values, factors in zip(wide, columns[row], strict=True):
                    self._add(totals[feature, row], values, factors)

    def _add(self, variable: Any, first: Any, second: Any) -> None:
        product = self.builder.fmul(first, second, flags=_ANY_ORDER)
        total = self.builder.fadd(self.builder.load(variable), product, flags=_ANY_ORDER)
        self.builder.store(total, variable)

    def _add_to_first_lane(self, variable: Any, number: Any) -> None:
        vector, lane = self.builder.load(variable), _INDEX(0)
        number = self.builder.extract_element(self.builder.load(number), lane)
        first = self.builder.extract_element(vector, lane)
        total = self.builder.fadd(first, number, flags=_ANY_ORDER)
        self.builder.store(self.builder.insert_element(vector, total, lane), variable)

    def _variable(self, kind: Any) -> Any:
        """0 at first; becomes a register."""
        place = cgutils.alloca_once(self.builder, kind)
        self.builder.store(ir.Constant(kind, None), place)
        return place

    def _splat(self, value: Any) -> Any:
        return _splat(self.builder, value, _WIDTH)

    def _sum(self, vector: Any) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, vector.type])
        name = f"llvm.vector.reduce.fadd.v{_WIDTH}f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [_FLOAT(0.0), vector], fastmath=_ANY_ORDER)

    def _fetch(self, place: Any) -> None:
        """Into the cache what comes later."""
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INDEX, _INDEX, _INDEX])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        later = self.builder.inttoptr(self.builder.add(place, _WORD(AHEAD)), pointer)
        read, keep, data = _INDEX(0), _INDEX(3), _INDEX(1)
        self.builder.call(function, [later, read, keep, data])

    def _at_most(self, index: Any, more: int, count: Any) -> Any:
        last = self.builder.sub(count, _WORD(1))
        index = self.builder.add(index, _WORD(more))
        return self.builder.select(self.builder.icmp_signed("<", index, last), index, last)

    def _place(self, address: Any, index: Any, stride: Any, size: int) -> Any:
        offset = self.builder.mul(index, self.builder.mul(stride, _WORD(size)))
        return self.builder.add(address, offset)

    def _float(self, place: Any, index: Any) -> Any:
        return self._load(place, index, _FLOAT, 4)

    def _load(self, place: Any, index: Any, kind: Any, size: int) -> Any:
        address = self._place(place, index, _WORD(1), size)
        return self.builder.load(self._pointer(address, kind), align=size)

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())


def _floats(integers: Any) -> Any:
    return ir.VectorType(_FLOAT, integers.type.count)


def _of_float32(builder: Any, bits: Any) -> list[Any]:
    return [builder.bitcast(bits, _floats(bits))]


def _of_bfloat16(builder: Any, bits: Any) -> list[Any]:
    """The float32 whose first 16 bits are these."""
    wide = ir.VectorType(ir.IntType(32), bits.type.count)
    shifted = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * wide.count))
    return [builder.bitcast(shifted, _floats(bits))]


def _of_int8(builder: Any, codes: Any) -> list[Any]:
    return [builder.sitofp(codes, _floats(codes))]


def _of_int4(builder: Any, codes: Any, scale: Any, zero: Any) -> list[Any]:
    """code * scale + zero of the codes in the low 4 bits and in the high ones.

    They are from -8 to 7, stored as 0 to 15.
    """
    wide = ir.VectorType(ir.IntType(32), codes.type.count)
    low = builder.zext(codes, wide)
    high = builder.lshr(low, ir.Constant(wide, [4] * wide.count))
    scales, zeros = (_splat(builder, value, wide.count) for value in (scale, zero))

    def scaled(numbers: Any) -> Any:
        product = builder.fmul(numbers, scales, flags=_ANY_ORDER)
        return builder.fadd(product, zeros, flags=_ANY_ORDER)

    if HAS_AVX512 and wide.count == _WIDTH:
        # once for a group, of all codes that there are
        table = scaled(ir.Constant(_floats(low), [float(code - 8) for code in range(16)]))
        return [_look_up(builder, table, low), _look_up(builder, table, high)]
    low = builder.and_(low, ir.Constant(wide, [15] * wide.count))
    # 8 times the scale, taken off the zero, would round more
    eight = ir.Constant(wide, [8] * wide.count)
    return [scaled(builder.sitofp(builder.sub(part, eight), _floats(part))) for part in (low, high)]


def _look_up(builder: Any, table: Any, indices: Any) -> Any:
    """By the last 4 bits of each index; one instruction for 16 codes."""
    kind = ir.FunctionType(table.type, [table.type, indices.type])
    name = "llvm.x86.avx512.permvar.sf.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [table, indices])


def _splat(builder: Any, value: Any, width: int) -> Any:
    """A vector of `width` times the value."""
    undefined = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    one = builder.insert_element(undefined, value, _INDEX(0))
    lanes = ir.Constant(ir.VectorType(_INDEX, width), None)
    return builder.shuffle_vector(one, undefined, lanes)


multiply_float32 = _multiply(_Kind(32, 1, False, _of_float32))
multiply_bfloat16 = _multiply(_Kind(16, 1, False, _of_bfloat16))
multiply_int8 = _multiply(_Kind(8, 1, True, _of_int8))
multiply_int4 = _multiply(_Kind(8, 2, True, _of_int4))
