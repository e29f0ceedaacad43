"""The inner loops of attention of one query a row: keys and values are read where the cache has them."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from llama_jax.numerics.cpu.machine import fill, free, malloc, pointer

_BLOCK = 64  # slots that are computed with at a time
_LINE = 64  # bytes of a line of the processor's caches


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
def _rows(cache: int, begin: int, end: int, dim: int, is_bfloat16: bool, scratch: int) -> Any:
    """Keys or values of the slots `begin` to `end` in float32: where they are, or in `scratch`."""
    if not is_bfloat16:
        return carray(pointer(cache + begin * dim * 4), (_BLOCK, dim), np.float32)
    # bfloat16 is the first half of a float32
    narrow = carray(pointer(cache + begin * dim * 2), (_BLOCK * dim,), np.uint16)
    bits = carray(pointer(scratch), (_BLOCK * dim,), np.uint32)
    for i in range((end - begin) * dim):
        bits[i] = np.uint32(narrow[i]) << np.uint32(16)
    return carray(pointer(scratch), (_BLOCK, dim), np.float32)


@_compile
def _scores(query: Any, keys: Any, scores: Any) -> None:
    for slot in range(len(scores)):
        key, score = keys[slot], np.float32(0)
        for i in range(len(query)):
            score += query[i] * key[i]
        scores[slot] = score


@_compile
def _softmax(scores: Any, visible: Any) -> Any:
    """Turn scores into weights, and return their sum, by which they are not divided."""
    largest, total = np.float32(-np.inf), np.float32(0)
    for slot in range(len(scores)):
        if visible[slot]:
            largest = max(largest, scores[slot])
    for slot in range(len(scores)):
        scores[slot] = np.exp(scores[slot] - largest) if visible[slot] else np.float32(0)
    for slot in range(len(scores)):  # a loop of its own is one of vectors, whose sums round less
        total += scores[slot]
    return total


@_compile
def _add_values(weights: Any, values: Any, part: Any, out: Any) -> None:
    """Of a block, which is added up first: that rounds less than one long sum."""
    fill(part, 0)
    in_fours = len(weights) - len(weights) % 4
    for slot in range(0, in_fours, 4):  # `part` is read and rounded less often
        a, b, c, d = values[slot], values[slot + 1], values[slot + 2], values[slot + 3]
        e, f, g, h = weights[slot], weights[slot + 1], weights[slot + 2], weights[slot + 3]
        for i in range(len(part)):
            part[i] += (e * a[i] + f * b[i]) + (g * c[i] + h * d[i])
    for slot in range(in_fours, len(weights)):
        a, e = values[slot], weights[slot]
        for i in range(len(part)):
            part[i] += e * a[i]
    for i in range(len(part)):
        out[i] += part[i]


@_compile
def attend(of: Any, is_bfloat16: bool, begin: int, end: int) -> None:
    """Compute out[row, head] for the heads `begin` to `end`, counted over all rows.

    Args:
        of: `Operands`, as a tuple.
    """
    query, keys, values, visible, out, heads, kv_heads, capacity, dim = of
    # an array of numba's would need its runtime
    memory = malloc(_LINE + ((_BLOCK + 2) * dim + capacity) * 4)
    scratch = (memory + _LINE - 1) // _LINE * _LINE
    scaled = carray(pointer(scratch + _BLOCK * dim * 4), (dim,), np.float32)
    part = carray(pointer(scratch + (_BLOCK + 1) * dim * 4), (dim,), np.float32)
    weights = carray(pointer(scratch + (_BLOCK + 2) * dim * 4), (capacity,), np.float32)
    for index in range(begin, end):
        row, head = index // heads, index % heads
        is_visible = carray(pointer(visible + row * capacity), (capacity,), np.uint8)
        first, last = 0, capacity
        while first < last and not is_visible[first]:
            first += 1
        while first < last and not is_visible[last - 1]:
            last -= 1
        one = carray(pointer(query + index * dim * 4), (dim,), np.float32)
        total = carray(pointer(out + index * dim * 4), (dim,), np.float32)
        fill(total, 0)
        if first == last:
            continue
        for i in range(dim):
            scaled[i] = one[i] / np.sqrt(dim)
        kv_head = row * kv_heads + head // (heads // kv_heads)
        place = kv_head * capacity * dim * (2 if is_bfloat16 else 4)
        for block in range(first, last, _BLOCK):
            stop = min(block + _BLOCK, last)
            of_block = _rows(keys + place, block, stop, dim, is_bfloat16, scratch)
            _scores(scaled, of_block, weights[block:stop])
        divisor = _softmax(weights[first:last], is_visible[first:last])
        for block in range(first, last, _BLOCK):
            stop = min(block + _BLOCK, last)
            of_block = _rows(values + place, block, stop, dim, is_bfloat16, scratch)
            _add_values(weights[block:stop], of_block, part, total)
        for i in range(dim):
            total[i] /= divisor
    free(memory)
