"""Blocks of queries and of keys, as both passes of attention's kernels have them: packing, and hiding.

Addresses are int64, distances are in bytes.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from llama_jax.numerics.cpu.machine import fill, pointer
from llama_jax.numerics.cpu.softmax import PIECE
from llama_jax.numerics.cpu.tiles import BLOCK_ROWS, DEPTH, PANEL, copy_row, transpose_tile
from llama_jax.numerics.cpu.vectors import LANES

GROUP = BLOCK_ROWS[0]  # rows that are computed together
FLOAT = 4  # bytes
LINE = 64
assert DEPTH == PIECE, "weights are scores in their place, and an operand of a matmul"

_compile = njit(error_model="numpy")  # kept as a part of what calls it


@_compile
def up(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit


@_compile
def pack_queries(
    query: int, distance: int, first: int, count: int, group: int, dim: int, target: int
) -> None:
    """Rows of each query's `group` heads, which follow each other; the last ones are repeated.

    Of `GROUP` rows come the first DEPTH values each, then the next ones.
    """
    rows = count * group
    for row in range(up(rows, GROUP)):
        number = min(row, rows - 1)
        source = query + (first + number // group) * distance + number % group * dim * FLOAT
        place = target + (row // GROUP * up(dim, DEPTH) * GROUP + row % GROUP * DEPTH) * FLOAT
        for index in range(0, dim, LANES):
            piece = index // DEPTH * DEPTH * (GROUP - 1)
            copy_row((source + index * FLOAT, place + (piece + index) * FLOAT))


@_compile
def pack_keys(
    key: int, distance: int, count: int, available: int, dim: int, target: int, spare: int
) -> None:
    """Panels [dim, PANEL] of `count` keys, of which there are `available` at that address."""
    for first in range(0, count, LANES):
        source, between = key + first * distance, distance
        if first + LANES > available:
            between = dim * FLOAT
            for index in range(LANES):
                last = min(first + index, available - 1)
                for place in range(0, between, LINE):
                    copy_row((key + last * distance + place, spare + index * between + place))
            source = spare
        panel = target + (first // PANEL * PANEL * dim + first % PANEL) * FLOAT
        for index in range(0, dim, LANES):
            transpose_tile(
                (source + index * FLOAT, between, panel + index * PANEL * FLOAT, PANEL * FLOAT)
            )


@_compile
def pack_values(value: int, distance: int, count: int, dim: int, target: int) -> None:
    """Panels [PIECE, PANEL]; the last of them is filled up with zeros."""
    for index in range(up(count, PIECE)):
        place = target + (index // PIECE * PIECE * dim + index % PIECE * PANEL) * FLOAT
        for column in range(0, dim, PANEL):
            panel = place + column * PIECE * FLOAT
            if index < count:
                source = value + index * distance + column * FLOAT
                copy_row((source, panel))
                copy_row((source + LINE, panel + LINE))
            else:
                fill(floats(panel, PANEL), 0)


@_compile
def integers(address: int, count: int) -> Any:
    """The int32 at an address."""
    return carray(pointer(address), (count,), np.int32)


@_compile
def floats(address: int, count: int) -> Any:
    """The float32 at an address."""
    return carray(pointer(address), (count,), np.float32)


@_compile
def bounds(values: Any) -> Any:
    """The least and the largest."""
    least = largest = values[0]
    for value in values:
        least, largest = min(least, value), max(largest, value)
    return least, largest


@_compile
def visible_range(slots: Any, segments: Any, key_slots: Any, key_segments: Any, until: Any) -> Any:
    """Of all keys that some of these queries may see: the first, the end, and whether causality is all
    that hides any of them."""
    lowest, highest = bounds(slots)
    segment, last_segment = bounds(segments)
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
def hide_after(scores: int, visible: int, pieces: int, between: int) -> None:
    """Hide all but the first `visible` keys of a row, whose pieces are `between` apart."""
    for piece in range(visible // PIECE, pieces):
        row = floats(scores + piece * between, PIECE)
        fill(row[max(visible - piece * PIECE, 0) :], -np.inf)


@_compile
def hide(
    scores: int,
    between: int,
    slot: int,
    segment: int,
    key_slots: Any,
    key_segments: Any,
    until: Any,
) -> None:
    """Hide what a query does not see of these keys, in a row whose pieces are `between` apart."""
    for first in range(0, len(key_slots), PIECE):
        row = floats(scores + first // PIECE * between, PIECE)
        last = min(first + PIECE, len(key_slots))
        of_slots, of_segments = key_slots[first:last], key_segments[first:last]
        of_until = until[first:last]
        for key in range(last - first):
            is_visible = (
                (of_slots[key] <= slot) & (slot <= of_until[key]) & (of_segments[key] == segment)
            )
            row[key] = row[key] if is_visible else -np.inf
