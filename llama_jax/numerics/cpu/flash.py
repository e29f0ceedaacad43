"""Attention of many queries: FlashAttention's forward pass (arXiv:2205.14135), with the blocks of queries
shared by XLA's threads.

Queries, keys and values are read where they are, [batch, tokens, heads, dim]. The heads that share keys are
rows of one matmul. A group of rows takes all visible keys of a chunk at once, so that for up to `_CHUNK`
keys its maximum is known before anything is summed up. A row is computed by one thread, in an order that
depends on its place and the keys alone.
"""

from typing import Any

import numpy as np
from numba import njit

from llama_jax.numerics.cpu.exported import exported
from llama_jax.numerics.cpu.flash_blocks import (
    FLOAT,
    GROUP,
    LINE,
    bounds,
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
from llama_jax.numerics.cpu.softmax import PIECE, exponentials, row_maximum
from llama_jax.numerics.cpu.threads import (
    DONE,
    HOLDERS,
    NEXT,
    REQUEST_WORDS,
    release,
    share,
    thread_count,
)
from llama_jax.numerics.cpu.tiles import DEPTH, PANEL, float32_blocks_of_rows
from llama_jax.numerics.cpu.vectors import LANES

# What a job has at these places, besides those of `threads`: addresses,
_QUERY, _KEY, _VALUE = 3, 4, 5
_QUERY_SLOTS, _KEY_SLOTS, _QUERY_SEGMENTS, _KEY_SEGMENTS, _VISIBLE_UNTIL = 6, 7, 8, 9, 10
_OUT, _ROW_MAX, _ROW_SUM = 11, 12, 13
# and sizes; a part is a block of queries for one row of the batch and one head of the keys
_BATCH, _QUERIES, _HEADS, _DIM, _KEYS, _KV_HEADS = 14, 15, 16, 17, 18, 19
_BLOCK, _PARTS = 20, 21
_REQUEST = 22  # of XLA
_WORDS = _REQUEST + REQUEST_WORDS

_BLOCK_ROWS = 384  # of a part: to pack keys is work for each
_CHUNK = 1024  # keys of which a part holds copies, which have to stay in the second cache
_LEAST_MAX = np.finfo(np.float32).min
_PIECE_BYTES = GROUP * PIECE * FLOAT  # of a group's scores, from one piece of a row to the next

_compile = njit(error_model="numpy")

_multiply = float32_blocks_of_rows[GROUP]


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
    slots = integers(job[_QUERY_SLOTS] + first * 4, count)
    segments = integers(job[_QUERY_SEGMENTS] + (batch * queries + first) * 4, count)
    key_slots = integers(job[_KEY_SLOTS], keys)
    key_segments = integers(job[_KEY_SEGMENTS] + batch * keys * 4, keys)
    until = integers(job[_VISIBLE_UNTIL] + batch * keys * 4, keys)
    begin, end, is_causal = visible_range(slots, segments, key_slots, key_segments, until)

    query = job[_QUERY] + (batch * queries * heads + kv_head * group) * dim * FLOAT
    pack_queries(query, heads * dim * FLOAT, first, count, group, dim, packed_queries)
    total = floats(totals, up(rows, GROUP) * dim)
    fill(total, 0)
    row_max, row_sum = floats(statistics, rows), floats(statistics + rows * FLOAT, rows)
    fill(row_max, -np.inf)
    fill(row_sum, 0)
    distance = kv_heads * dim * FLOAT
    offset = (batch * keys * kv_heads + kv_head) * dim * FLOAT
    for start in range(begin, end, _CHUNK):
        size = min(_CHUNK, end - start)
        place = offset + start * distance
        pack_keys(job[_KEY] + place, distance, size, keys - start, dim, packed_keys, spare)
        pack_values(job[_VALUE] + place, distance, size, dim, packed_values)
        for first_row in range(0, rows, GROUP):
            last_row = min(first_row + GROUP, rows)
            seen = size
            if is_causal:
                of_group = slots[first_row // group : (last_row - 1) // group + 1]
                seen = min(size, bounds(of_group)[1] + 1 - key_slots[begin] - (start - begin))
                if seen <= 0:
                    continue
            pieces = -(-seen // PIECE)
            packed = packed_queries + first_row * up(dim, DEPTH) * FLOAT
            for column in range(0, seen, PANEL):
                place = scores + column // PIECE * _PIECE_BYTES + column % PIECE * FLOAT
                for index in range(0, dim, DEPTH):
                    panel = packed_keys + (column * dim + index * PANEL) * FLOAT
                    depth = min(DEPTH, dim - index)
                    a = packed + index * GROUP * FLOAT
                    _multiply((a, panel, place, PIECE * FLOAT, depth, index))
            for row in range(first_row, last_row):
                of_row = scores + (row - first_row) * PIECE * FLOAT
                slot = slots[row // group]
                visible = seen
                if is_causal:
                    visible = min(seen, slot + 1 - key_slots[begin] - (start - begin))
                else:
                    stop = start + seen
                    hide(
                        of_row,
                        _PIECE_BYTES,
                        slot,
                        segments[row // group],
                        key_slots[start:stop],
                        key_segments[start:stop],
                        until[start:stop],
                    )
                hide_after(of_row, max(visible, 0), pieces, _PIECE_BYTES)
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
                depth = min(PIECE, up(seen - piece * PIECE, 4))
                weights = scores + piece * _PIECE_BYTES
                for column in range(0, dim, PANEL):
                    panel = packed_values + (piece * dim + column) * PIECE * FLOAT
                    place = totals + (first_row * dim + column) * FLOAT
                    _multiply((weights, panel, place, dim * FLOAT, depth, 1))
    for row in range(rows):
        index = (batch * queries + first + row // group) * heads + kv_head * group + row % group
        # a row that sees nothing has an output of zeros
        divisor = row_sum[row] if row_sum[row] != 0 else np.float32(1)
        floats(job[_ROW_MAX], index + 1)[index] = max(row_max[row], _LEAST_MAX)
        floats(job[_ROW_SUM], index + 1)[index] = divisor
        out = floats(job[_OUT] + index * dim * FLOAT, dim)
        of_row = total[row * dim : (row + 1) * dim]
        for place in range(dim):
            out[place] = of_row[place] / divisor


@exported("llama_jax_flash_work")
def work(address: int) -> int:
    """Take parts until none is left."""
    job = words(address)
    dim, rows = job[_DIM], up(job[_BLOCK] * (job[_HEADS] // job[_KV_HEADS]), GROUP)
    chunk = min(_CHUNK, up(job[_KEYS], PIECE))
    sizes = (
        rows * up(dim, DEPTH),  # packed queries
        chunk * dim,  # packed keys
        chunk * dim,  # packed values
        LANES * dim,  # the last keys
        chunk * GROUP,  # scores
        rows * dim,  # sums
        2 * rows,  # statistics
    )
    begin = malloc(LINE + sum(sizes) * FLOAT)
    first = up(begin, LINE)
    second = first + sizes[0] * FLOAT
    third = second + sizes[1] * FLOAT
    fourth = third + sizes[2] * FLOAT
    fifth = fourth + sizes[3] * FLOAT
    sixth = fifth + sizes[4] * FLOAT
    seventh = sixth + sizes[5] * FLOAT
    memory = (first, second, third, fourth, fifth, sixth, seventh)
    while True:
        part = fetch_add(address + NEXT * BYTES, 1)
        if part >= job[_PARTS]:
            break
        _attend(job, memory, part)
        fetch_add(address + DONE * BYTES, 1)
    free(begin)
    return 0


@exported("llama_jax_flash_task")
def task(address: int) -> int:
    """What another thread of XLA does for a call."""
    call(work(), address)
    release(address)
    return 0


@_compile
def _new_job(frame: Any) -> int:
    """The job of a call, see `flash_call.attend` for its operands."""
    arguments, results = words(frame[ARGUMENTS]), words(frame[RESULTS])
    query, key = words(arguments[0]), words(arguments[1])
    shape, key_shape = words(query[DIMENSIONS]), words(key[DIMENSIONS])
    address = calloc(_WORDS, BYTES)
    job = words(address)
    for index in range(8):
        job[_QUERY + index] = words(arguments[index])[DATA]
    for index in range(3):
        job[_OUT + index] = words(results[index])[DATA]
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
    request, parts = address + _REQUEST * BYTES, words(address)[_PARTS]
    thread_count(frame, request)
    share(frame, address, request, parts, work(), task())


@exported("llama_jax_flash_attention")
def handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = words(address)
    if frame[EXTENSION] != 0:
        answer_registration(frame[EXTENSION])
    else:
        _run(frame)
    return 0
