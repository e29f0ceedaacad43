"""The inner loops of attention of one query a row: keys and values are read where the cache has them."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from llama_jax.numerics.cpu.machine import pointer

_BYTES = 4  # of a float32
_BLOCK = 64  # slots whose values are added up before they are added to the result


class Operands(NamedTuple):
    """Of a call, as int64: addresses and sizes."""

    query: Any  # float32 [rows, heads, dim]
    keys: Any  # float32 or bfloat16 [rows * kv_heads, capacity, dim]
    values: Any  # as the keys
    visible: Any  # bool [rows, capacity]
    out: Any  # float32 [rows, heads, dim]
    heads: Any
    kv_heads: Any
    capacity: Any
    dim: Any


# Sums in any order, so that they are vectors. NaN and infinity stay what they are.
_compile = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


@_compile
def _widened(address: int, begin: int, end: int, dim: int) -> Any:
    """Slots of bfloat16, which is the first half of a float32, as float32 [end, dim]."""
    narrow = carray(pointer(address), (end * dim,), np.uint16)
    bits = np.empty(end * dim, np.uint32)
    for i in range(begin * dim, end * dim):
        bits[i] = np.uint32(narrow[i]) << np.uint32(16)
    return bits.view(np.float32)


@_compile
def _attend(
    query: Any, keys: Any, values: Any, visible: Any, weights: Any, out: Any, begin: int, end: int
) -> None:
    """Of one head; keys and values are [slots * dim], and `weights` is for the weights."""
    dim = len(query)
    largest = np.float32(-np.inf)
    for slot in range(begin, end):
        score = np.float32(0)
        for i in range(dim):
            score += query[i] * keys[slot * dim + i]
        weights[slot] = score
        if visible[slot]:
            largest = max(largest, score)
    scale, total = np.float32(1 / np.sqrt(dim)), np.float32(0)
    for slot in range(begin, end):
        weight = np.exp((weights[slot] - largest) * scale) if visible[slot] else np.float32(0)
        weights[slot] = weight
    for slot in range(begin, end):  # a loop of its own is one of vectors, whose sums round less
        total += weights[slot]
    # sums of blocks round less than one long sum; four slots at once are read and rounded less often
    part = np.empty(dim, np.float32)
    for block in range(begin, end, _BLOCK):
        stop = min(block + _BLOCK, end)
        in_fours = stop - (stop - block) % 4
        part[:] = 0
        for slot in range(block, in_fours, 4):
            place = slot * dim
            for i in range(dim):
                first = weights[slot] * values[place + i]
                first += weights[slot + 1] * values[place + dim + i]
                second = weights[slot + 2] * values[place + 2 * dim + i]
                second += weights[slot + 3] * values[place + 3 * dim + i]
                part[i] += first + second
        for slot in range(in_fours, stop):
            for i in range(dim):
                part[i] += weights[slot] * values[slot * dim + i]
        for i in range(dim):
            out[i] += part[i]
    for i in range(dim):
        out[i] /= total


@_compile
def attend(of: Any, is_bfloat16: bool, begin: int, end: int) -> None:
    """Compute out[row, head] for the heads `begin` to `end`, counted over all rows.

    Args:
        of: `Operands`, as a tuple.
    """
    query, keys, values, visible, out, heads, kv_heads, capacity, dim = of
    weights = np.empty(capacity, np.float32)
    for index in range(begin, end):
        row, head = index // heads, index % heads
        is_visible = carray(pointer(visible + row * capacity), (capacity,), np.uint8)
        first, last = 0, capacity
        while first < last and not is_visible[first]:
            first += 1
        while first < last and not is_visible[last - 1]:
            last -= 1
        place = index * dim * _BYTES
        one = carray(pointer(query + place), (dim,), np.float32)
        total = carray(pointer(out + place), (dim,), np.float32)
        total[:] = 0
        if first == last:
            continue
        place = (row * kv_heads + head // (heads // kv_heads)) * capacity * dim
        if is_bfloat16:
            wide_keys = _widened(keys + place * 2, first, last, dim)
            wide_values = _widened(values + place * 2, first, last, dim)
        else:
            wide_keys = carray(pointer(keys + place * _BYTES), (capacity * dim,), np.float32)
            wide_values = carray(pointer(values + place * _BYTES), (capacity * dim,), np.float32)
        _attend(one, wide_keys, wide_values, is_visible, weights, total, first, last)
