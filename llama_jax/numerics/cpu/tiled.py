"""Matmuls of many rows: the function that XLA calls, with the blocks of a result shared by its threads.

Each block of the result is summed up by one thread, in an order that depends on the contracted index
alone, so that the result does not depend on the number of threads.
"""

from typing import Any

from numba import njit

from llama_jax.numerics.cpu.exported import exported
from llama_jax.numerics.cpu.frame import (
    ARGUMENTS,
    BFLOAT16,
    BUFFER_DTYPE,
    BYTES,
    DATA,
    DIMENSIONS,
    EXTENSION,
    RESULTS,
    answer_registration,
    only_attribute,
    words,
)
from llama_jax.numerics.cpu.layout import A_FIRST, B_LAST
from llama_jax.numerics.cpu.machine import (
    call,
    calloc,
    fetch_add,
    free,
    malloc,
)
from llama_jax.numerics.cpu.threads import (
    DONE,
    HOLDERS,
    NEXT,
    REQUEST_WORDS,
    release,
    share,
    thread_count,
)
from llama_jax.numerics.cpu.tiles import (
    BLOCK_ROWS,
    DEPTH,
    PANEL,
    bfloat16_block,
    configure_amx,
    copy_quad,
    copy_row,
    copy_tile,
    float32_blocks_of_columns,
    float32_blocks_of_rows,
    pair_and_transpose_tile,
    pair_tile,
    release_amx,
    round_block,
    transpose_tile,
)
from llama_jax.numerics.cpu.vectors import LANES

# What a job has at these places, besides those of `threads`.
_DTYPE, _LAYOUT, _A, _B, _C = 3, 4, 5, 6, 7  # dtype and layout of the operands, addresses
_C_DTYPE = 8
_BATCH, _ROWS, _COLUMNS, _INNER = 9, 10, 11, 12  # sizes; the last is contracted
_BLOCK_ROWS, _BLOCK_COLUMNS, _BLOCKS = 13, 14, 15  # sizes of a block, and number of all
_REQUEST = 16  # of XLA
_COUNT = _REQUEST + REQUEST_WORDS - 1  # of its threads
_WORDS = _REQUEST + REQUEST_WORDS

# Rows and columns of a block. Packing an element is work for each block that needs it, and what is packed
# of `b` for DEPTH of float32, or TILE_DEPTH of bfloat16, has to stay in the second cache.
_BLOCK_SIZE = 512
_LEAST_BLOCK = 128
_TILE_DEPTH = 512
_BLOCKS_PER_THREAD = 2
_A_BYTES = PANEL * _TILE_DEPTH * 2
_B_BYTES = _BLOCK_SIZE * _TILE_DEPTH * 2
_SUM_BYTES = _BLOCK_SIZE * _BLOCK_SIZE * 4
_LINE = 64
_MOST_ROWS = BLOCK_ROWS[0]

_compile = njit(error_model="numpy")

_rows_12, _rows_8, _rows_4 = (float32_blocks_of_rows[rows] for rows in BLOCK_ROWS)
_columns_12, _columns_8, _columns_4 = (float32_blocks_of_columns[rows] for rows in BLOCK_ROWS)


@_compile
def _add_float32_block(
    is_rows: Any, rows: int, a: int, b: int, c: int, distance: int, depth: int, adds: int
) -> None:
    if is_rows:
        if rows == 12:
            _rows_12((a, b, c, distance, depth, adds))
        elif rows == 8:
            _rows_8((a, b, c, distance, depth, adds))
        else:
            _rows_4((a, b, c, distance, depth, adds))
    elif rows == 12:
        _columns_12((a, b, c, distance, depth, adds))
    elif rows == 8:
        _columns_8((a, b, c, distance, depth, adds))
    else:
        _columns_4((a, b, c, distance, depth, adds))


@_compile
def _pack_float32_rows(
    a: int, distance: int, a_first: Any, rows: int, depth: int, target: int
) -> None:
    """`rows` rows of `depth` values, as `float32_blocks_of_rows` or `_of_columns` have them."""
    if a_first:
        for inner in range(depth):
            source = a + inner * distance
            for row in range(0, rows, 4):
                copy_quad((source + row * 4, target + (inner * rows + row) * 4))
    else:
        for row in range(rows):
            source = a + row * distance
            for inner in range(0, depth, LANES):
                copy_row((source + inner * 4, target + (row * DEPTH + inner) * 4))


@_compile
def _pack_float32_columns(
    b: int, distance: int, b_last: Any, columns: int, depth: int, target: int
) -> None:
    """Panels [depth, PANEL]."""
    for column in range(0, columns, LANES):
        panel = target + (column // PANEL * depth * PANEL + column % PANEL) * 4
        for inner in range(0, depth, LANES):
            place = panel + inner * PANEL * 4
            if b_last:
                transpose_tile((b + column * distance + inner * 4, distance, place, PANEL * 4))
            else:
                copy_tile((b + inner * distance + column * 4, distance, place, PANEL * 4))


@_compile
def _multiply_float32(
    layout: int, a: int, b: int, c: int, sizes: Any, block: Any, a_packed: int, b_packed: int
) -> None:
    """The block (first row, rows, first column, columns) of c = a b of sizes (rows, columns, inner)."""
    a_first, b_last = (layout & A_FIRST) != 0, (layout & B_LAST) != 0
    all_rows, all_columns, all_inner = sizes
    first_row, rows, first_column, columns = block
    a_distance = (all_rows if a_first else all_inner) * 4
    b_distance = (all_inner if b_last else all_columns) * 4
    c_distance = all_columns * 4
    parts = -(-all_inner // DEPTH)
    step = -(-all_inner // (parts * LANES)) * LANES
    for inner in range(0, all_inner, step):
        depth = min(step, all_inner - inner)
        b_place = b + (inner * 4 if b_last else inner * b_distance)
        b_place += first_column * b_distance if b_last else first_column * 4
        _pack_float32_columns(b_place, b_distance, b_last, columns, depth, b_packed)
        for row in range(first_row, first_row + rows, _MOST_ROWS):
            count = min(_MOST_ROWS, first_row + rows - row)
            a_place = a + (inner * a_distance if a_first else inner * 4)
            a_place += row * 4 if a_first else row * a_distance
            _pack_float32_rows(a_place, a_distance, a_first, count, depth, a_packed)
            for column in range(0, columns, PANEL):
                _add_float32_block(
                    not a_first,
                    count,
                    a_packed,
                    b_packed + column * depth * 4,
                    c + row * c_distance + (first_column + column) * 4,
                    c_distance,
                    depth,
                    inner,
                )


@_compile
def _pack_bfloat16_rows(a: int, distance: int, a_first: Any, depth: int, target: int) -> None:
    """Two rows of tiles."""
    for row in range(0, PANEL, LANES):
        for inner in range(0, depth, PANEL):
            place = target + row * depth * 2 + inner * PANEL
            if a_first:
                source = a + inner * distance + row * 2
                pair_and_transpose_tile((source, distance, place, _LINE))
            else:
                copy_tile((a + row * distance + inner * 2, distance, place, _LINE))


@_compile
def _pack_bfloat16_columns(
    b: int, distance: int, b_last: Any, columns: int, depth: int, target: int
) -> None:
    """Columns of tiles of pairs."""
    for column in range(0, columns, LANES):
        for inner in range(0, depth, PANEL):
            place = target + column * depth * 2 + inner * PANEL
            if b_last:
                transpose_tile((b + column * distance + inner * 2, distance, place, _LINE))
            else:
                pair_tile((b + inner * distance + column * 2, distance, place, _LINE))


@_compile
def _multiply_bfloat16(
    layout: int,
    a: int,
    b: int,
    c: int,
    sizes: Any,
    block: Any,
    a_packed: int,
    b_packed: int,
    sums: int,
    is_rounded: Any,
) -> None:
    """As `_multiply_float32`; c is float32 or, summed up in `sums` and then rounded, bfloat16."""
    a_first, b_last = (layout & A_FIRST) != 0, (layout & B_LAST) != 0
    all_rows, all_columns, all_inner = sizes
    first_row, rows, first_column, columns = block
    a_distance = (all_rows if a_first else all_inner) * 2
    b_distance = (all_inner if b_last else all_columns) * 2
    c_size = 2 if is_rounded else 4
    c_distance = all_columns * c_size
    # of one part, every sum is rounded at once, in the same place
    is_one = all_inner <= _TILE_DEPTH
    sums_distance = (PANEL if is_one else columns) * 4
    configure_amx(())
    for inner in range(0, all_inner, _TILE_DEPTH):
        depth = min(_TILE_DEPTH, all_inner - inner)
        b_place = b + (inner * 2 if b_last else inner * b_distance)
        b_place += first_column * b_distance if b_last else first_column * 2
        _pack_bfloat16_columns(b_place, b_distance, b_last, columns, depth, b_packed)
        half = depth * PANEL  # bytes of 16 rows
        for row in range(0, rows, PANEL):
            a_place = a + (inner * a_distance if a_first else inner * 2)
            a_place += (first_row + row) * (2 if a_first else a_distance)
            _pack_bfloat16_rows(a_place, a_distance, a_first, depth, a_packed)
            for column in range(0, columns, PANEL):
                place = c + (first_row + row) * c_distance + (first_column + column) * c_size
                total, distance = place, c_distance
                if is_rounded:
                    total, distance = sums, sums_distance
                    if not is_one:
                        total += row * sums_distance + column * 4
                packed = b_packed + column * depth * 2
                steps = depth // PANEL
                bfloat16_block((a_packed, half, packed, half, total, distance, steps, inner))
                if is_rounded and inner + depth == all_inner:
                    round_block((total, distance, place, c_distance))
    release_amx(())


@exported("llama_jax_tiled_work")
def work(address: int) -> int:
    """Take blocks until none is left."""
    job = words(address)
    is_rounded = job[_C_DTYPE] == BFLOAT16
    memory = malloc(_LINE + _A_BYTES + _B_BYTES + (_SUM_BYTES if is_rounded else 0))
    a_packed = (memory + _LINE - 1) // _LINE * _LINE
    b_packed = a_packed + _A_BYTES
    sums = b_packed + _B_BYTES
    rows, columns, inner = job[_ROWS], job[_COLUMNS], job[_INNER]
    across = -(-columns // job[_BLOCK_COLUMNS])
    of_matrix = across * -(-rows // job[_BLOCK_ROWS])
    is_bfloat16 = job[_DTYPE] == BFLOAT16
    size = 2 if is_bfloat16 else 4
    while True:
        number = fetch_add(address + NEXT * BYTES, 1)
        if number >= job[_BLOCKS]:
            break
        matrix, number = number // of_matrix, number % of_matrix
        row = number // across * job[_BLOCK_ROWS]
        column = number % across * job[_BLOCK_COLUMNS]
        block = (
            row,
            min(job[_BLOCK_ROWS], rows - row),
            column,
            min(job[_BLOCK_COLUMNS], columns - column),
        )
        a = job[_A] + matrix * rows * inner * size
        b = job[_B] + matrix * columns * inner * size
        c = job[_C] + matrix * rows * columns * (2 if is_rounded else 4)
        sizes = (rows, columns, inner)
        if is_bfloat16:
            _multiply_bfloat16(
                job[_LAYOUT], a, b, c, sizes, block, a_packed, b_packed, sums, is_rounded
            )
        else:
            _multiply_float32(job[_LAYOUT], a, b, c, sizes, block, a_packed, b_packed)
        fetch_add(address + DONE * BYTES, 1)
    free(memory)
    return 0


@exported("llama_jax_tiled_task")
def task(address: int) -> int:
    """What another thread of XLA does for a call."""
    call(work(), address)
    release(address)
    return 0


@_compile
def _even(size: int, most: int, unit: int) -> int:
    """The size of parts, at most `most`, that are about equal and multiples of `unit`."""
    parts = -(-size // most)
    return -(-size // (parts * unit)) * unit


@_compile
def _divide(job: Any) -> None:
    """Choose blocks: several for each thread, but no more than needed."""
    unit = PANEL if job[_DTYPE] == BFLOAT16 else _MOST_ROWS
    most_rows = most_columns = _BLOCK_SIZE
    while True:
        job[_BLOCK_ROWS] = _even(job[_ROWS], most_rows, unit)
        job[_BLOCK_COLUMNS] = _even(job[_COLUMNS], most_columns, PANEL)
        down = -(-job[_ROWS] // job[_BLOCK_ROWS])
        across = -(-job[_COLUMNS] // job[_BLOCK_COLUMNS])
        job[_BLOCKS] = job[_BATCH] * down * across
        if job[_BLOCKS] >= _BLOCKS_PER_THREAD * job[_COUNT] or most_columns == _LEAST_BLOCK:
            return
        if most_rows == most_columns:
            most_rows //= 2
        else:
            most_columns //= 2


@_compile
def _new_job(frame: Any) -> int:
    """The job of a call of a and b, [batch, ., .] each, and c [batch, rows, columns]."""
    layout = only_attribute(frame)
    arguments, results = words(frame[ARGUMENTS]), words(frame[RESULTS])
    a, b, c = words(arguments[0]), words(arguments[1]), words(results[0])
    a_shape, shape = words(a[DIMENSIONS]), words(c[DIMENSIONS])
    address = calloc(_WORDS, BYTES)
    job = words(address)
    job[_DTYPE], job[_LAYOUT] = a[BUFFER_DTYPE] & 0xFFFFFFFF, layout
    job[_A], job[_B], job[_C] = a[DATA], b[DATA], c[DATA]
    job[_C_DTYPE] = c[BUFFER_DTYPE] & 0xFFFFFFFF
    job[_BATCH], job[_ROWS], job[_COLUMNS] = shape[0], shape[1], shape[2]
    job[_INNER] = a_shape[1 if layout & A_FIRST else 2]
    job[HOLDERS] = 1
    return address


@_compile
def _multiply(frame: Any) -> None:
    address = _new_job(frame)
    job, request = words(address), address + _REQUEST * BYTES
    thread_count(frame, request)
    _divide(job)
    share(frame, address, request, job[_BLOCKS], work(), task())


@exported("llama_jax_tiled_matmul")
def handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = words(address)
    if frame[EXTENSION] != 0:
        answer_registration(frame[EXTENSION])
    else:
        _multiply(frame)
    return 0
