"""Packing and multiplying tiles of matrices, written in LLVM's vectors and Intel's AMX instructions.

Arguments are tuples of int64: addresses, distances in bytes and counts. A tile is 16 rows of 64 bytes, each
16 values of 32 bits: float32, or pairs of bfloat16 that are next to each other in the contracted index.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_jax.numerics.cpu.processor import HAS_AMX
from llama_jax.numerics.cpu.vectors import (
    BITS_VECTOR,
    FLOAT,
    FLOAT_VECTOR,
    LANES,
    WORD,
    fma,
    load,
    splat,
    store,
)

TILE_BYTES = 1024
PANEL = 32  # columns of a block, and in bfloat16 its rows: two tiles
# The most that a float32 block sums up in one go. After a value that is much larger than the others, as the
# first token's often is, all sums are rounded like it: with 192 the gradient of SmolLM2-135M's k_proj over
# 2,000 tokens had 1.47 times PyTorch's error.
DEPTH = 64
# Rows of a float32 block: with 12 and two vectors of columns, 24 of 32 registers are sums.
BLOCK_ROWS = (12, 8, 4)

_BYTE = ir.IntType(8)
_QUAD = ir.VectorType(FLOAT, 4)
_ROW = 64
_UNROLL = 4


def _define(emit: Callable[..., None]) -> Any:
    """An intrinsic of a tuple of int64, which returns nothing."""

    def emit_call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, *cgutils.unpack_tuple(builder, arguments[0]))
        return context.get_dummy_value()

    @intrinsic
    def define(_: Any, arguments: Any) -> Any:
        return types.void(arguments), emit_call

    return define


def _after(builder: Any, address: Any, count: int, distance: Any) -> Any:
    return builder.add(address, builder.mul(distance, WORD(count)))


def _tile_rows(builder: Any, source: Any, distance: Any) -> list[Any]:
    return [
        load(builder, _after(builder, source, row, distance), BITS_VECTOR) for row in range(LANES)
    ]


def _paired_rows(builder: Any, source: Any, distance: Any) -> list[Any]:
    """16 columns of 32 rows of bfloat16, as pairs of rows."""
    halves = ir.VectorType(ir.IntType(16), LANES)
    shift = ir.Constant(BITS_VECTOR, [16] * LANES)
    rows = [
        builder.zext(load(builder, _after(builder, source, row, distance), halves), BITS_VECTOR)
        for row in range(2 * LANES)
    ]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [builder.or_(low, builder.shl(high, shift)) for low, high in pairs]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The tile's transpose: interleaving the lanes of its halves is a perfect shuffle, four are all."""
    half = LANES // 2
    order = [lane for index in range(LANES) for lane in (index, index + LANES)]
    low, high = (ir.Constant(BITS_VECTOR, part) for part in (order[:LANES], order[LANES:]))
    for _ in range(4):
        rows = [
            builder.shuffle_vector(rows[index], rows[index + half], lanes)
            for index in range(half)
            for lanes in (low, high)
        ]
    return rows


def _packer(rows_of: Callable[[Any, Any, Any], list[Any]]) -> Any:
    """An intrinsic that stores a tile of (source, distance of its rows, target, distance)."""

    def emit(builder: Any, source: Any, distance: Any, target: Any, target_distance: Any) -> None:
        for index, row in enumerate(rows_of(builder, source, distance)):
            store(builder, row, _after(builder, target, index, target_distance))

    return _define(emit)


copy_tile = _packer(_tile_rows)
transpose_tile = _packer(lambda *source: _transposed(source[0], _tile_rows(*source)))
pair_tile = _packer(_paired_rows)
pair_and_transpose_tile = _packer(lambda *source: _transposed(source[0], _paired_rows(*source)))


def _copier(kind: Any) -> Any:
    """An intrinsic that copies a vector of (source, target)."""
    return _define(
        lambda builder, source, target: store(builder, load(builder, source, kind), target)
    )


copy_row, copy_quad = _copier(FLOAT_VECTOR), _copier(_QUAD)


def _float32_block(rows: int, row_distance: int, depth_distance: int) -> Any:
    """An intrinsic of (a, b, c, distance of c's rows, depth, whether to add): c [rows, 32] is or gets a b.

    Args:
        row_distance, depth_distance: between the values of `a`, in bytes. Those of `b` are [depth, 32].
    """

    def emit(builder: Any, a: Any, b: Any, c: Any, distance: Any, depth: Any, adds: Any) -> None:
        places = [(row, column) for row in range(rows) for column in range(2)]
        sums = {place: cgutils.alloca_once(builder, FLOAT_VECTOR) for place in places}
        for variable in sums.values():
            builder.store(ir.Constant(FLOAT_VECTOR, None), variable)
        with cgutils.for_range_slice(builder, WORD(0), depth, WORD(_UNROLL)) as (first, _):
            a_first = builder.add(a, builder.mul(first, WORD(depth_distance)))
            b_first = builder.add(b, builder.mul(first, WORD(2 * _ROW)))
            for step in range(_UNROLL):
                columns = [
                    load(builder, builder.add(b_first, WORD((2 * step + j) * _ROW)), FLOAT_VECTOR)
                    for j in range(2)
                ]
                for row in range(rows):
                    offset = WORD(row * row_distance + step * depth_distance)
                    value = splat(builder, load(builder, builder.add(a_first, offset), FLOAT))
                    for j in range(2):
                        variable = sums[row, j]
                        total = fma(builder, value, columns[j], builder.load(variable))
                        builder.store(total, variable)
        with builder.if_else(builder.icmp_signed("!=", adds, WORD(0))) as branches:
            for branch, is_sum in zip(branches, (True, False), strict=True):
                with branch:
                    for (row, column), variable in sums.items():
                        place = _after(builder, c, row, distance)
                        place = builder.add(place, WORD(column * _ROW))
                        total = builder.load(variable)
                        if is_sum:
                            total = builder.fadd(load(builder, place, FLOAT_VECTOR), total)
                        store(builder, total, place)

    return _define(emit)


# of `a` as rows of DEPTH values, and as columns of `rows` values
float32_blocks_of_rows = {rows: _float32_block(rows, DEPTH * 4, 4) for rows in BLOCK_ROWS}
float32_blocks_of_columns = {rows: _float32_block(rows, 4, rows * 4) for rows in BLOCK_ROWS}
# of `a` as some columns of rows of DEPTH values
float32_columns_of_pieces = {rows: _float32_block(rows, 4, DEPTH * 4) for rows in BLOCK_ROWS}


def _amx(builder: Any, name: str, *arguments: Any) -> None:
    """An instruction of AMX, or none; its registers are constants of 8 bits, addresses are pointers."""
    if not HAS_AMX:
        return
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, arguments)


def _bfloat16_block(
    builder: Any, a: Any, a_distance: Any, b: Any, b_distance: Any, c: Any, distance: Any,
    steps: Any, adds: Any,
) -> None:  # fmt: skip
    """c [32, 32] in float32 is, or gets, a b: of each two rows or columns of `steps` tiles."""

    def load_tile(register: int, address: Any, row_distance: Any) -> None:
        place = builder.inttoptr(address, _BYTE.as_pointer())
        _amx(builder, "tileloadd64", _BYTE(register), place, row_distance)

    places = [
        builder.add(_after(builder, c, LANES * row, distance), WORD(column * _ROW))
        for row in range(2)
        for column in range(2)
    ]
    with builder.if_else(builder.icmp_signed("!=", adds, WORD(0))) as (is_sum, is_new):
        with is_sum:
            for register, place in enumerate(places):
                load_tile(register, place, distance)
        with is_new:
            for register in range(4):
                _amx(builder, "tilezero", _BYTE(register))
    row = WORD(_ROW)
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.mul(loop.index, WORD(TILE_BYTES))
        a_tile, b_tile = builder.add(a, offset), builder.add(b, offset)
        load_tile(4, a_tile, row)
        load_tile(6, b_tile, row)
        load_tile(7, builder.add(b_tile, b_distance), row)
        load_tile(5, builder.add(a_tile, a_distance), row)
        for register, a_register, b_register in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            _amx(builder, "tdpbf16ps", *map(_BYTE, (register, a_register, b_register)))
    for register, place in enumerate(places):
        target = builder.inttoptr(place, _BYTE.as_pointer())
        _amx(builder, "tilestored64", _BYTE(register), target, distance)


bfloat16_block = _define(_bfloat16_block)


def _round(builder: Any, source: Any, distance: Any, target: Any, target_distance: Any) -> None:
    """A block [32, 32] of float32 to bfloat16, to the nearest, of two the even one."""

    def all_lanes(value: int) -> Any:
        return ir.Constant(BITS_VECTOR, [value] * LANES)

    with cgutils.for_range(builder, WORD(PANEL)) as loop:
        row = builder.add(source, builder.mul(loop.index, distance))
        target_row = builder.add(target, builder.mul(loop.index, target_distance))
        for half in range(2):
            bits = load(builder, builder.add(row, WORD(half * _ROW)), BITS_VECTOR)
            odd = builder.and_(builder.lshr(bits, all_lanes(16)), all_lanes(1))
            rounded = builder.add(builder.add(bits, all_lanes(0x7FFF)), odd)
            magnitude = builder.and_(bits, all_lanes(0x7FFFFFFF))
            is_nan = builder.icmp_unsigned(">", magnitude, all_lanes(0x7F800000))
            quiet = builder.or_(bits, all_lanes(0x400000))
            high = builder.lshr(builder.select(is_nan, quiet, rounded), all_lanes(16))
            place = builder.add(target_row, WORD(half * _ROW // 2))
            store(builder, builder.trunc(high, ir.VectorType(ir.IntType(16), LANES)), place)


round_block = _define(_round)


def _configure(builder: Any) -> None:
    """Let all eight registers of AMX have 16 rows of 64 bytes."""
    configuration = bytearray(64)
    configuration[0] = 1  # palette
    for register in range(8):
        configuration[16 + 2 * register] = _ROW
        configuration[48 + register] = LANES
    kind = ir.ArrayType(_BYTE, len(configuration))
    place = cgutils.alloca_once(builder, kind)
    builder.store(ir.Constant(kind, configuration), place)
    _amx(builder, "ldtilecfg", builder.bitcast(place, _BYTE.as_pointer()))


configure_amx = _define(_configure)
release_amx = _define(lambda builder: _amx(builder, "tilerelease"))
