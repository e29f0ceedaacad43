"""The gradients of attention: FlashAttention's backward pass (arXiv:2205.14135, 2307.08691), with the heads
of keys shared by XLA's threads.

Scores are computed as in `flash`, so that weights are those of the forward pass, and what a row's sum was
rounded to does not matter. Of each block of queries and each piece of keys, weights and gradients of scores
stay in the caches: as rows they are multiplied with keys, as columns with queries and with the output's
gradients. One thread sums up all of a head of keys, in an order that depends on the sizes alone.
"""

from typing import Any

import numpy as np
from numba import njit

from llama_jax.numerics.cpu.exported import exported
from llama_jax.numerics.cpu.flash_blocks import (
    FLOAT,
    GROUP,
    LINE,
    floats,
    hide,
    hide_after,
    integers,
    pack_keys,
    pack_queries,
    pack_values,
    up,
    visible_range,
)
from llama_jax.numerics.cpu.frame import (
    ARGUMENTS,
    BYTES,
    DATA,
    DIMENSIONS,
    EXTENSION,
    RESULTS,
    answer_registration,
    words,
)
from llama_jax.numerics.cpu.machine import (
    call,
    calloc,
    fetch_add,
    fill,
    free,
    malloc,
)
from llama_jax.numerics.cpu.softmax import PIECE, gradients_of_scores
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
    DEPTH,
    PANEL,
    copy_row,
    float32_blocks_of_rows,
    float32_columns_of_pieces,
)
from llama_jax.numerics.cpu.vectors import LANES

# What a job has at these places, besides those of `threads`: addresses,
_QUERY, _KEY, _VALUE = 3, 4, 5
_QUERY_SLOTS, _KEY_SLOTS, _QUERY_SEGMENTS, _KEY_SEGMENTS, _VISIBLE_UNTIL = 6, 7, 8, 9, 10
_ROW_MAX, _ROW_SUM, _DELTA, _D_OUT = 11, 12, 13, 14
_D_QUERY, _D_KEY, _D_VALUE = 15, 16, 17
# and sizes; a part is one row of the batch and one head of the keys
_BATCH, _QUERIES, _HEADS, _DIM, _KEYS, _KV_HEADS = 18, 19, 20, 21, 22, 23
_BLOCK, _PARTS = 24, 25
_REQUEST = 26  # of XLA
_WORDS = _REQUEST + REQUEST_WORDS
_ARGUMENTS, _RESULTS = 12, 3

_BLOCK_ROWS = (
    384  # queries times heads that share keys; what is packed of them stays in the second cache
)
_COLUMNS = 8  # keys that are summed up over queries at a time
_ROW_BYTES = PIECE * FLOAT  # of scores

_compile = njit(error_model="numpy")

_multiply = float32_blocks_of_rows[GROUP]
_multiply_columns = float32_columns_of_pieces[_COLUMNS]


@_compile
def _pack_panels(rows: int, count: int, dim: int, target: int) -> None:
    """Panels [PIECE, PANEL] of what `pack_queries` packed as rows."""
    for row in range(count):
        source = rows + (row // GROUP * up(dim, DEPTH) * GROUP + row % GROUP * DEPTH) * FLOAT
        place = target + (row // PIECE * PIECE * dim + row % PIECE * PANEL) * FLOAT
        for index in range(0, dim, LANES):
            of_row = index // DEPTH * DEPTH * GROUP + index % DEPTH
            panel = index // PANEL * PANEL * PIECE + index % PANEL
            copy_row((source + of_row * FLOAT, place + panel * FLOAT))


@_compile
def _divide_rows(rows: int, count: int, dim: int, divisors: Any) -> None:
    """Divide what `pack_queries` packed by a number for each row."""
    for row in range(count):
        for index in range(0, dim, DEPTH):
            start = row // GROUP * up(dim, DEPTH) * GROUP + row % GROUP * DEPTH + index * GROUP
            values = floats(rows + start * FLOAT, min(DEPTH, dim - index))
            for place in range(len(values)):
                values[place] /= divisors[row]


@_compile
def _multiply_rows(rows: int, row: int, dim: int, panels: int, piece: int, target: int) -> None:
    """A group of rows times a piece of keys or values in panels [dim, PANEL]."""
    packed = rows + row * up(dim, DEPTH) * FLOAT
    for column in range(0, PIECE, PANEL):
        place = target + (row * PIECE + column) * FLOAT
        for index in range(0, dim, DEPTH):
            panel = panels + ((piece + column) * dim + index * PANEL) * FLOAT
            a = packed + index * GROUP * FLOAT
            _multiply((a, panel, place, _ROW_BYTES, min(DEPTH, dim - index), index))


@_compile
def _add_columns(of_rows: int, first: int, rows: int, dim: int, panels: int, sums: int) -> None:
    """Add to `sums` [PIECE, dim]: a piece of columns, from row `first` on, times panels of rows."""
    for key in range(0, PIECE, _COLUMNS):
        for column in range(0, dim, PANEL):
            place = sums + (key * dim + column) * FLOAT
            row = first
            while row < rows:
                depth = min(PIECE - row % PIECE, rows - row)
                panel = row // PIECE * PIECE * dim + column * PIECE + row % PIECE * PANEL
                a = of_rows + (row * PIECE + key) * FLOAT
                _multiply_columns((a, panels + panel * FLOAT, place, dim * FLOAT, depth, 1))
                row += depth


@_compile
def _rows_of(
    address: int, base: int, first: int, rows: int, group: int, heads: int, to: Any
) -> None:
    """Copy a number for each row, of [queries, heads] from `base` on."""
    for row in range(rows):
        index = base + (first + row // group) * heads + row % group
        to[row] = floats(address, index + 1)[index]


@_compile
def _differentiate(job: Any, memory: Any, part: int) -> None:
    """Compute a part."""
    queries, heads, dim = job[_QUERIES], job[_HEADS], job[_DIM]
    keys, kv_heads = job[_KEYS], job[_KV_HEADS]
    group, scale = heads // kv_heads, np.float32(1 / np.sqrt(dim))
    batch, kv_head = part // kv_heads, part % kv_heads
    operands, of_block, scores = memory
    key_panels, value_panels, key_rows, d_keys, d_values, spare = operands
    query_rows, query_panels, d_out_rows, d_out_panels, d_queries, statistics = of_block
    weights, slopes = scores
    of_keys = up(keys, PIECE)
    key_slots = integers(job[_KEY_SLOTS], keys)
    key_segments = integers(job[_KEY_SEGMENTS] + batch * keys * 4, keys)
    until = integers(job[_VISIBLE_UNTIL] + batch * keys * 4, keys)
    key_distance = kv_heads * dim * FLOAT
    key_offset = (batch * keys * kv_heads + kv_head) * dim * FLOAT
    head = batch * queries * heads + kv_head * group
    pack_keys(job[_KEY] + key_offset, key_distance, of_keys, keys, dim, key_panels, spare)
    pack_keys(job[_VALUE] + key_offset, key_distance, of_keys, keys, dim, value_panels, spare)
    pack_values(job[_KEY] + key_offset, key_distance, keys, dim, key_rows)
    fill(floats(d_keys, of_keys * dim), 0)
    fill(floats(d_values, of_keys * dim), 0)
    for first in range(0, queries, job[_BLOCK]):
        count = min(job[_BLOCK], queries - first)
        rows = count * group
        in_fours = up(rows, 4)
        slots = integers(job[_QUERY_SLOTS] + first * 4, count)
        segments = integers(job[_QUERY_SEGMENTS] + (batch * queries + first) * 4, count)
        begin, end, is_causal = visible_range(slots, segments, key_slots, key_segments, until)
        distance = heads * dim * FLOAT
        row_max, row_sum = floats(statistics, rows), floats(statistics + rows * FLOAT, rows)
        delta = floats(statistics + 2 * rows * FLOAT, rows)
        _rows_of(job[_ROW_MAX], head, first, rows, group, heads, row_max)
        _rows_of(job[_ROW_SUM], head, first, rows, group, heads, row_sum)
        _rows_of(job[_DELTA], head, first, rows, group, heads, delta)
        for row in range(rows):
            delta[row] /= row_sum[row]
        place = head * dim * FLOAT
        pack_queries(job[_QUERY] + place, distance, first, count, group, dim, query_rows)
        pack_queries(job[_D_OUT] + place, distance, first, count, group, dim, d_out_rows)
        _divide_rows(d_out_rows, rows, dim, row_sum)
        _pack_panels(query_rows, in_fours, dim, query_panels)
        _pack_panels(d_out_rows, in_fours, dim, d_out_panels)
        d_query = floats(d_queries, up(rows, GROUP) * dim)
        fill(d_query, 0)
        for piece in range(begin // PIECE * PIECE, end, PIECE):
            stop = min(piece + PIECE, keys)
            first_row = 0
            if is_causal:
                lowest = key_slots[max(piece, begin)]
                while first_row < rows and slots[first_row // group] < lowest:
                    first_row += 1
                first_row = first_row // GROUP * GROUP
            for row in range(first_row, rows, GROUP):
                _multiply_rows(query_rows, row, dim, key_panels, piece, weights)
                _multiply_rows(d_out_rows, row, dim, value_panels, piece, slopes)
            for row in range(first_row, rows):
                of_row = weights + row * _ROW_BYTES
                slot, visible = slots[row // group], stop - piece
                if is_causal and piece >= begin:
                    visible = min(visible, max(slot + 1 - key_slots[piece], 0))
                else:
                    hide(
                        of_row,
                        0,
                        slot,
                        segments[row // group],
                        key_slots[piece:stop],
                        key_segments[piece:stop],
                        until[piece:stop],
                    )
                hide_after(of_row, visible, 1, 0)
                gradients_of_scores(
                    of_row, slopes + row * _ROW_BYTES, scale, row_max[row], delta[row]
                )
            missing = (in_fours - rows) * PIECE
            fill(floats(weights + rows * _ROW_BYTES, missing), 0)
            fill(floats(slopes + rows * _ROW_BYTES, missing), 0)
            sums = piece * dim * FLOAT
            _add_columns(weights, first_row, in_fours, dim, d_out_panels, d_values + sums)
            _add_columns(slopes, first_row, in_fours, dim, query_panels, d_keys + sums)
            for row in range(first_row, rows, GROUP):
                for column in range(0, dim, PANEL):
                    panel = key_rows + (piece * dim + column * PIECE) * FLOAT
                    place = d_queries + (row * dim + column) * FLOAT
                    a = slopes + row * _ROW_BYTES
                    _multiply((a, panel, place, dim * FLOAT, PIECE, 1))
        for row in range(rows):
            index = head + (first + row // group) * heads + row % group
            target = job[_D_QUERY] + index * dim * FLOAT
            for place in range(0, dim, LANES):
                copy_row((d_queries + (row * dim + place) * FLOAT, target + place * FLOAT))
    for key in range(keys):
        source, target = key * dim * FLOAT, key_offset + key * key_distance
        for place in range(0, dim * FLOAT, LINE):
            copy_row((d_keys + source + place, job[_D_KEY] + target + place))
            copy_row((d_values + source + place, job[_D_VALUE] + target + place))


@exported("llama_jax_flash_backward_work")
def work(address: int) -> int:
    """Take parts until none is left."""
    job = words(address)
    dim, rows = job[_DIM], up(job[_BLOCK] * (job[_HEADS] // job[_KV_HEADS]), GROUP)
    of_keys = up(job[_KEYS], PIECE) * dim * FLOAT
    of_rows, of_panels = rows * up(dim, DEPTH) * FLOAT, up(rows, PIECE) * dim * FLOAT
    of_scores = rows * _ROW_BYTES
    spare, d_queries, statistics = LANES * dim * FLOAT, rows * dim * FLOAT, 3 * rows * FLOAT
    memory = malloc(
        LINE + 5 * of_keys + spare + 2 * (of_rows + of_panels + of_scores) + d_queries + statistics
    )
    keys = up(memory, LINE)
    queries = keys + 5 * of_keys + spare
    d_queries_place = queries + 2 * (of_rows + of_panels)
    scores = d_queries_place + d_queries
    places = (
        (
            keys,
            keys + of_keys,
            keys + 2 * of_keys,
            keys + 3 * of_keys,
            keys + 4 * of_keys,
            keys + 5 * of_keys,
        ),
        (
            queries,
            queries + 2 * of_rows,
            queries + of_rows,
            queries + 2 * of_rows + of_panels,
            d_queries_place,
            scores + 2 * of_scores,
        ),
        (scores, scores + of_scores),
    )
    while True:
        part = fetch_add(address + NEXT * BYTES, 1)
        if part >= job[_PARTS]:
            break
        _differentiate(job, places, part)
        fetch_add(address + DONE * BYTES, 1)
    free(memory)
    return 0


@exported("llama_jax_flash_backward_task")
def task(address: int) -> int:
    """What another thread of XLA does for a call."""
    call(work(), address)
    release(address)
    return 0


@_compile
def _new_job(frame: Any) -> int:
    """The job of a call, see `flash_backward_call.gradients` for its operands."""
    arguments, results = words(frame[ARGUMENTS]), words(frame[RESULTS])
    query, key = words(arguments[0]), words(arguments[1])
    shape, key_shape = words(query[DIMENSIONS]), words(key[DIMENSIONS])
    address = calloc(_WORDS, BYTES)
    job = words(address)
    for index in range(_ARGUMENTS):
        job[_QUERY + index] = words(arguments[index])[DATA]
    for index in range(_RESULTS):
        job[_D_QUERY + index] = words(results[index])[DATA]
    for index in range(4):
        job[_BATCH + index] = shape[index]
    job[_KEYS], job[_KV_HEADS] = key_shape[1], key_shape[2]
    job[_BLOCK] = max(_BLOCK_ROWS * job[_KV_HEADS] // job[_HEADS], 1)
    job[_PARTS] = job[_BATCH] * job[_KV_HEADS]
    job[HOLDERS] = 1
    return address


@_compile
def _run(frame: Any) -> None:
    address = _new_job(frame)
    request, parts = address + _REQUEST * BYTES, words(address)[_PARTS]
    thread_count(frame, request)
    share(frame, address, request, parts, work(), task())


@exported("llama_jax_flash_backward")
def handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = words(address)
    if frame[EXTENSION] != 0:
        answer_registration(frame[EXTENSION])
    else:
        _run(frame)
    return 0
