"""Attention of many queries: FlashAttention's forward pass (arXiv:2205.14135), with the blocks of queries
shared by XLA's threads.

Queries, keys and values are read where they are, [batch, tokens, heads, dim]. The heads that share keys are
rows of one matmul. A group of rows takes all visible keys of a chunk at once, so that for up to `_CHUNK`
keys its maximum is known before anything is summed up. A row is computed by one thread, in an order that
depends on its place and the keys alone.
"""

from typing import Any

import numpy as np
from llvmlite import binding
from numba import carray, cfunc, njit, types

from llama_jax.numerics.cpu.frame import (
    ARGUMENTS,
    BYTES,
    DATA,
    DIMENSIONS,
    EXTENSION,
    FRAME_WORDS,
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
    load,
    malloc,
    pointer,
    sched_yield,
    symbol_address,
)
from llama_jax.numerics.cpu.softmax import PIECE, exponentials, row_maximum
from llama_jax.numerics.cpu.threads import (
    DONE,
    HOLDERS,
    NEXT,
    REQUEST_WORDS,
    release,
    schedule,
    thread_count,
)
from llama_jax.numerics.cpu.tiles import (
    BLOCK_ROWS,
    DEPTH,
    PANEL,
    copy_row,
    float32_blocks_of_rows,
    transpose_tile,
)
from llama_jax.numerics.cpu.vectors import LANES

# What a job has at these places, besides those of `threads`: addresses,
_QUERY, _KEY, _VALUE = 3, 4, 5
_QUERY_SLOTS, _KEY_SLOTS, _QUERY_SEGMENTS, _KEY_SEGMENTS, _VISIBLE_UNTIL = 6, 7, 8, 9, 10
_OUT = 11
# and sizes; a part is a block of queries for one row of the batch and one head of the keys
_BATCH, _QUERIES, _HEADS, _DIM, _KEYS, _KV_HEADS = 12, 13, 14, 15, 16, 17
_BLOCK, _PARTS = 18, 19
_REQUEST = 20  # of XLA
_WORDS = _REQUEST + REQUEST_WORDS

_GROUP = BLOCK_ROWS[0]  # rows that are computed together
_BLOCK_ROWS = 384  # of a part: to pack keys is work for each
_CHUNK = 1024  # keys of which a part holds copies, which have to stay in the second cache
_FLOAT = 4  # bytes
_LINE = 64
_PIECE_BYTES = _GROUP * PIECE * _FLOAT  # of a group's scores, from one piece of a row to the next
assert DEPTH == PIECE, "weights are scores in their place, and an operand of a matmul"

# numba keeps what it compiled for as long as this file is the same. This checksum of the others, which a
# test compares, makes it another file when they change.
OTHER_SOURCES = "19f6b31746908f41"

_compile = njit(error_model="numpy", cache=True)

_multiply = float32_blocks_of_rows[_GROUP]


@_compile
def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@_compile
def _pack_queries(
    query: int, distance: int, first: int, count: int, group: int, dim: int, target: int
) -> None:
    """Rows of each query's `group` heads, which follow each other; the last ones are repeated.

    Of `_GROUP` rows come the first DEPTH values each, then the next ones.
    """
    rows = count * group
    for row in range(_up(rows, _GROUP)):
        number = min(row, rows - 1)
        source = query + (first + number // group) * distance + number % group * dim * _FLOAT
        place = target + (row // _GROUP * _up(dim, DEPTH) * _GROUP + row % _GROUP * DEPTH) * _FLOAT
        for index in range(0, dim, LANES):
            piece = index // DEPTH * DEPTH * (_GROUP - 1)
            copy_row((source + index * _FLOAT, place + (piece + index) * _FLOAT))


@_compile
def _pack_keys(
    key: int, distance: int, count: int, available: int, dim: int, target: int, spare: int
) -> None:
    """Panels [dim, PANEL] of `count` keys, of which there are `available` at that address."""
    for first in range(0, count, LANES):
        source, between = key + first * distance, distance
        if first + LANES > available:
            between = dim * _FLOAT
            for index in range(LANES):
                last = min(first + index, available - 1)
                for place in range(0, between, _LINE):
                    copy_row((key + last * distance + place, spare + index * between + place))
            source = spare
        panel = target + (first // PANEL * PANEL * dim + first % PANEL) * _FLOAT
        for index in range(0, dim, LANES):
            transpose_tile(
                (source + index * _FLOAT, between, panel + index * PANEL * _FLOAT, PANEL * _FLOAT)
            )


@_compile
def _pack_values(value: int, distance: int, count: int, dim: int, target: int) -> None:
    """Panels [PIECE, PANEL]; the last of them is filled up with zeros."""
    for index in range(_up(count, PIECE)):
        place = target + (index // PIECE * PIECE * dim + index % PIECE * PANEL) * _FLOAT
        for column in range(0, dim, PANEL):
            panel = place + column * PIECE * _FLOAT
            if index < count:
                source = value + index * distance + column * _FLOAT
                copy_row((source, panel))
                copy_row((source + _LINE, panel + _LINE))
            else:
                fill(_floats(panel, PANEL), 0)


@_compile
def _integers(address: int, count: int) -> Any:
    return carray(pointer(address), (count,), np.int32)


@_compile
def _floats(address: int, count: int) -> Any:
    return carray(pointer(address), (count,), np.float32)


@_compile
def _bounds(values: Any) -> Any:
    """The least and the largest."""
    least = largest = values[0]
    for value in values:
        least, largest = min(least, value), max(largest, value)
    return least, largest


@_compile
def _visible_range(slots: Any, segments: Any, key_slots: Any, key_segments: Any, until: Any) -> Any:
    """Of all keys that some of these queries may see: the first, the end, and whether causality is all
    that hides any of them."""
    lowest, highest = _bounds(slots)
    segment, last_segment = _bounds(segments)
    is_one = segment == last_segment
    begin, end = 0, len(key_slots)
    while begin < end and key_slots[end - 1] > highest:
        end -= 1
    while begin < end and (until[begin] < lowest or (is_one and key_segments[begin] != segment)):
        begin += 1
    is_causal = is_one
    for key in range(begin, end):
        is_causal = (
            is_causal
            and until[key] >= highest
            and key_segments[key] == segment
            and key_slots[key] - key_slots[begin] == key - begin
        )
    return begin, end, is_causal


@_compile
def _hide_after(scores: int, visible: int, pieces: int) -> None:
    """Hide all but the first `visible` keys of a row."""
    for piece in range(visible // PIECE, pieces):
        row = _floats(scores + piece * _PIECE_BYTES, PIECE)
        fill(row[max(visible - piece * PIECE, 0) :], -np.inf)


@_compile
def _hide(
    scores: int, slot: int, segment: int, key_slots: Any, key_segments: Any, until: Any
) -> None:
    """Hide what a query does not see of these keys."""
    for first in range(0, len(key_slots), PIECE):
        row = _floats(scores + first // PIECE * _PIECE_BYTES, PIECE)
        last = min(first + PIECE, len(key_slots))
        of_slots, of_segments = key_slots[first:last], key_segments[first:last]
        of_until = until[first:last]
        for key in range(last - first):
            is_visible = (
                (of_slots[key] <= slot) & (slot <= of_until[key]) & (of_segments[key] == segment)
            )
            row[key] = row[key] if is_visible else -np.inf


@_compile
def _attend(job: Any, memory: Any, part: int) -> None:
    """Compute a part."""
    queries, heads, dim = job[_QUERIES], job[_HEADS], job[_DIM]
    keys, kv_heads = job[_KEYS], job[_KV_HEADS]
    group, scale = heads // kv_heads, np.float32(1 / np.sqrt(dim))
    pairs = job[_BATCH] * kv_heads
    # the last blocks see most keys, and come first
    first = (job[_PARTS] - 1 - part) // pairs * job[_BLOCK]
    batch, kv_head = part % pairs // kv_heads, part % pairs % kv_heads
    count = min(job[_BLOCK], queries - first)
    rows = count * group
    packed_queries, packed_keys, packed_values, spare, scores, totals, statistics = memory
    slots = _integers(job[_QUERY_SLOTS] + first * 4, count)
    segments = _integers(job[_QUERY_SEGMENTS] + (batch * queries + first) * 4, count)
    key_slots = _integers(job[_KEY_SLOTS], keys)
    key_segments = _integers(job[_KEY_SEGMENTS] + batch * keys * 4, keys)
    until = _integers(job[_VISIBLE_UNTIL] + batch * keys * 4, keys)
    begin, end, is_causal = _visible_range(slots, segments, key_slots, key_segments, until)

    query = job[_QUERY] + (batch * queries * heads + kv_head * group) * dim * _FLOAT
    _pack_queries(query, heads * dim * _FLOAT, first, count, group, dim, packed_queries)
    total = _floats(totals, _up(rows, _GROUP) * dim)
    fill(total, 0)
    row_max, row_sum = _floats(statistics, rows), _floats(statistics + rows * _FLOAT, rows)
    fill(row_max, -np.inf)
    fill(row_sum, 0)
    distance = kv_heads * dim * _FLOAT
    offset = (batch * keys * kv_heads + kv_head) * dim * _FLOAT
    for start in range(begin, end, _CHUNK):
        size = min(_CHUNK, end - start)
        place = offset + start * distance
        _pack_keys(job[_KEY] + place, distance, size, keys - start, dim, packed_keys, spare)
        _pack_values(job[_VALUE] + place, distance, size, dim, packed_values)
        for first_row in range(0, rows, _GROUP):
            last_row = min(first_row + _GROUP, rows)
            seen = size
            if is_causal:
                of_group = slots[first_row // group : (last_row - 1) // group + 1]
                seen = min(size, _bounds(of_group)[1] + 1 - key_slots[begin] - (start - begin))
                if seen <= 0:
                    continue
            pieces = -(-seen // PIECE)
            packed = packed_queries + first_row * _up(dim, DEPTH) * _FLOAT
            for column in range(0, seen, PANEL):
                place = scores + column // PIECE * _PIECE_BYTES + column % PIECE * _FLOAT
                for index in range(0, dim, DEPTH):
                    panel = packed_keys + (column * dim + index * PANEL) * _FLOAT
                    depth = min(DEPTH, dim - index)
                    a = packed + index * _GROUP * _FLOAT
                    _multiply((a, panel, place, PIECE * _FLOAT, depth, index))
            for row in range(first_row, last_row):
                of_row = scores + (row - first_row) * PIECE * _FLOAT
                slot = slots[row // group]
                visible = seen
                if is_causal:
                    visible = min(seen, slot + 1 - key_slots[begin] - (start - begin))
                else:
                    stop = start + seen
                    _hide(
                        of_row,
                        slot,
                        segments[row // group],
                        key_slots[start:stop],
                        key_segments[start:stop],
                        until[start:stop],
                    )
                _hide_after(of_row, max(visible, 0), pieces)
                largest = max(row_max[row], row_maximum(of_row, pieces, _PIECE_BYTES) * scale)
                shift = largest if largest > -np.inf else np.float32(0)
                if row_sum[row] > 0:
                    factor = np.exp(row_max[row] - shift)
                    row_sum[row] *= factor
                    of_row_total = total[row * dim : (row + 1) * dim]
                    for place in range(dim):
                        of_row_total[place] *= factor
                row_max[row] = largest
                row_sum[row] += exponentials(of_row, pieces, _PIECE_BYTES, scale, shift)
            for piece in range(pieces):
                depth = min(PIECE, _up(seen - piece * PIECE, 4))
                weights = scores + piece * _PIECE_BYTES
                for column in range(0, dim, PANEL):
                    panel = packed_values + (piece * dim + column) * PIECE * _FLOAT
                    place = totals + (first_row * dim + column) * _FLOAT
                    _multiply((weights, panel, place, dim * _FLOAT, depth, 1))
    for row in range(rows):
        index = (batch * queries + first + row // group) * heads + kv_head * group + row % group
        # a row that sees nothing has an output of zeros
        divisor = row_sum[row] if row_sum[row] != 0 else np.float32(1)
        out = _floats(job[_OUT] + index * dim * _FLOAT, dim)
        of_row = total[row * dim : (row + 1) * dim]
        for place in range(dim):
            out[place] = of_row[place] / divisor


@cfunc(types.int64(types.int64), cache=True)
def work(address: int) -> int:
    """Take parts until none is left.

    It is called by its address: numba would compile all of it again for each function that calls it.
    """
    job = words(address, _WORDS)
    dim, rows = job[_DIM], _up(job[_BLOCK] * (job[_HEADS] // job[_KV_HEADS]), _GROUP)
    chunk = min(_CHUNK, _up(job[_KEYS], PIECE))
    sizes = (
        rows * _up(dim, DEPTH),  # packed queries
        chunk * dim,  # packed keys
        chunk * dim,  # packed values
        LANES * dim,  # the last keys
        chunk * _GROUP,  # scores
        rows * dim,  # sums
        2 * rows,  # statistics
    )
    begin = malloc(_LINE + sum(sizes) * _FLOAT)
    first = _up(begin, _LINE)
    second = first + sizes[0] * _FLOAT
    third = second + sizes[1] * _FLOAT
    fourth = third + sizes[2] * _FLOAT
    fifth = fourth + sizes[3] * _FLOAT
    sixth = fifth + sizes[4] * _FLOAT
    seventh = sixth + sizes[5] * _FLOAT
    memory = (first, second, third, fourth, fifth, sixth, seventh)
    while True:
        part = fetch_add(address + NEXT * BYTES, 1)
        if part >= job[_PARTS]:
            break
        _attend(job, memory, part)
        fetch_add(address + DONE * BYTES, 1)
    free(begin)
    return 0


_WORK = "llama_jax_flash_work"
binding.add_symbol(_WORK, work.address)
_work_address = symbol_address(_WORK)


@cfunc(types.void(types.int64), cache=True)
def task(address: int) -> None:
    """What another thread of XLA does for a call."""
    call(_work_address(), address)
    release(address)


_TASK = "llama_jax_flash_task"
binding.add_symbol(_TASK, task.address)
_task_address = symbol_address(_TASK)


@_compile
def _new_job(frame: Any) -> int:
    """The job of a call, see `flash_call.attend` for its operands."""
    arguments, results = words(frame[ARGUMENTS], 8), words(frame[RESULTS], 1)
    query, key = words(arguments[0], 6), words(arguments[1], 6)
    shape, key_shape = words(query[DIMENSIONS], 4), words(key[DIMENSIONS], 4)
    address = calloc(_WORDS, BYTES)
    job = words(address, _WORDS)
    for index in range(8):
        job[_QUERY + index] = words(arguments[index], 6)[DATA]
    job[_OUT] = words(results[0], 6)[DATA]
    for index in range(4):
        job[_BATCH + index] = shape[index]
    job[_KEYS], job[_KV_HEADS] = key_shape[1], key_shape[2]
    job[_BLOCK] = max(_BLOCK_ROWS * job[_KV_HEADS] // job[_HEADS], 1)
    job[_PARTS] = job[_BATCH] * job[_KV_HEADS] * -(-job[_QUERIES] // job[_BLOCK])
    job[HOLDERS] = 1
    return address


@_compile
def _run(frame: Any) -> None:
    address = _new_job(frame)
    job, request = words(address, _WORDS), address + _REQUEST * BYTES
    threads = thread_count(frame, request)
    schedule(frame, request, _task_address(), address, min(threads, job[_PARTS]) - 1)
    call(_work_address(), address)
    while load(address + DONE * BYTES) < job[_PARTS]:
        sched_yield()
    release(address)


@cfunc(types.int64(types.int64), cache=True)
def handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = words(address, FRAME_WORDS)
    if frame[EXTENSION] != 0:
        answer_registration(frame[EXTENSION])
    else:
        _run(frame)
    return 0
