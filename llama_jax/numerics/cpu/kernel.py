"""x weight^T for few rows x: the function that XLA calls, with the work of a call shared by its threads.

XLA calls `handler` with a frame of its C interface (xla/ffi/api/c_api.h in jaxlib). Rows of the weight are
taken in chunks by whichever thread is free: a thread that never comes is not waited for, as it may itself
wait behind this call.
"""

from typing import Any

import numpy as np
from llvmlite import binding
from numba import carray, cfunc, njit, types

from llama_jax.numerics.cpu.block import (
    multiply_bfloat16,
    multiply_float32,
    multiply_int4,
    multiply_int8,
)
from llama_jax.numerics.cpu.machine import (
    SEATS,
    TASK,
    call,
    compare_exchange,
    exchange,
    fetch_add,
    free,
    lasting_zeros,
    load,
    malloc,
    pointer,
    sched_yield,
    seats_address,
    task_address,
)

# A job is what the threads of a call share, words of 8 bytes at these places; behind them, for 4-bit codes,
# the sums of x over groups, float32 [rows, groups].
_NEXT, _DONE, _HOLDERS = 0, 1, 2  # weight rows taken and computed; threads that hold the job
_DTYPE, _X, _CODES, _SCALE, _ZERO, _OUT = 3, 4, 5, 6, 7, 8  # dtype of the codes, addresses
_ROWS, _IN, _FEATURES, _GROUPS, _CHUNK = 9, 10, 11, 12, 13
_CALL, _COUNT = 14, 19  # arguments for XLA
_WORDS = 20
_BYTES, _FLOAT_BYTES = 8, 4

# Places in XLA's structures, in words.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 1, 2, 3, 9, 14  # of a frame
_SCHEDULE, _THREADS = 17, 18  # functions of the API
_BUFFER_DTYPE, _DATA, _DIMENSIONS = 2, 3, 5
_METADATA, _METADATA_VERSION = 1, 3  # kind of extension; version in the metadata
_INT8, _INT4, _FLOAT32, _BFLOAT16 = 2, 6, 11, 16  # _INT4: uint8, with two codes each
_VERSION = 0 | 3 << 32  # major 0, minor 3

# A thread that has worked looks into a seat for its next job so many times, since to wake one can take
# longer than a call; in between others may run. A seat has the address of a job, or one of these.
_PATIENCE = 3000
_SEATS, _SEAT_BYTES = 8, 64  # a cache line each
_FREE, _WAITING = 0, 1

# Weights of a chunk: enough that taking it costs nothing, few enough that threads end together.
_CHUNK_WEIGHTS = 1 << 15

# numba keeps what it compiled for as long as this file is the same. This checksum of the other two, which a
# test compares, makes it another file when they change.
OTHER_SOURCES = "654dd991fe614b42"

# Sums in any order, so that they are vectors. NaN and infinity stay what they are.
_compile = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=True)


@_compile
def _words(address: int, count: int) -> Any:
    return carray(pointer(address), (count,), np.int64)


@_compile
def _work(address: int) -> None:
    """Take chunks until none is left."""
    job = _words(address, _WORDS)
    operands = (
        job[_CODES],
        job[_X],
        job[_SCALE],
        job[_ZERO],
        address + _WORDS * _BYTES,
        job[_OUT],
        job[_ROWS],
        job[_IN],
        job[_FEATURES],
        job[_GROUPS],
    )
    while True:
        begin = fetch_add(address + _NEXT * _BYTES, job[_CHUNK])
        if begin >= job[_FEATURES]:
            return
        end = min(begin + job[_CHUNK], job[_FEATURES])
        if job[_DTYPE] == _BFLOAT16:
            multiply_bfloat16(operands, begin, end)
        elif job[_DTYPE] == _FLOAT32:
            multiply_float32(operands, begin, end)
        elif job[_DTYPE] == _INT8:
            multiply_int8(operands, begin, end)
        else:
            multiply_int4(operands, begin, end)
        fetch_add(address + _DONE * _BYTES, end - begin)


@_compile
def _seats(threads: int) -> int:
    """For threads that wait: half of XLA's, which has work of its own between calls."""
    return min(threads // 2, _SEATS)


@_compile
def _release(address: int) -> None:
    """The last holder frees the job."""
    if fetch_add(address + _HOLDERS * _BYTES, -1) == 1:
        free(address)


binding.add_symbol(SEATS, lasting_zeros(_SEATS * _SEAT_BYTES))


@_compile
def _wait_for_job(seats: int) -> int:
    """The job of a call that comes soon, or 0; with a seat for as long, if one is free."""
    for index in range(seats):
        seat = seats_address() + index * _SEAT_BYTES
        if compare_exchange(seat, _FREE, _WAITING) == _FREE:
            for _ in range(_PATIENCE):
                if load(seat) != _WAITING:
                    break
                sched_yield()
            job = exchange(seat, _FREE)
            return 0 if job == _WAITING else job
    return 0


@cfunc(types.void(types.int64), cache=True)
def task(address: int) -> None:
    """What another thread of XLA does for a call, and for those that follow at once."""
    while address != 0:
        seats = _seats(_words(address, _WORDS)[_COUNT])
        _work(address)
        _release(address)
        address = _wait_for_job(seats)


binding.add_symbol(TASK, task.address)


@_compile
def _sum_groups(address: int) -> None:
    """The sums of x that are multiplied with zeros, behind the job."""
    job = _words(address, _WORDS)
    rows, groups, size = job[_ROWS], job[_GROUPS], job[_IN] // job[_GROUPS]
    x = carray(pointer(job[_X]), (rows, groups, size), np.float32)
    sums = carray(pointer(address + _WORDS * _BYTES), (rows, groups), np.float32)
    for row in range(rows):
        for group in range(groups):
            total = np.float32(0)
            for column in range(size):
                total += x[row, group, column]
            sums[row, group] = total


@_compile
def _new_job(frame: Any) -> int:
    """The job of a call of x [rows, in], codes [features, ...], scale [features, groups] and zero."""
    arguments, results = _words(frame[_ARGUMENTS], 4), _words(frame[_RESULTS], 1)
    x, codes = _words(arguments[0], 6), _words(arguments[1], 6)
    scale, zero = _words(arguments[2], 6), _words(arguments[3], 6)
    shape = _words(x[_DIMENSIONS], 2)
    groups = _words(scale[_DIMENSIONS], 2)[1]
    address = malloc(_WORDS * _BYTES + shape[0] * groups * _FLOAT_BYTES)
    job = _words(address, _WORDS)
    job[:] = 0
    job[_DTYPE] = codes[_BUFFER_DTYPE] & 0xFFFFFFFF
    job[_X], job[_CODES], job[_SCALE] = x[_DATA], codes[_DATA], scale[_DATA]
    job[_ZERO], job[_OUT] = zero[_DATA], _words(results[0], 6)[_DATA]
    job[_ROWS], job[_IN] = shape[0], shape[1]
    job[_FEATURES] = _words(codes[_DIMENSIONS], 1)[0]
    job[_GROUPS] = groups
    job[_CHUNK] = max(1, _CHUNK_WEIGHTS // job[_IN])
    job[_HOLDERS] = 1
    if job[_DTYPE] == _INT4:
        _sum_groups(address)
    return address


@_compile
def _multiply(frame: Any) -> None:
    address = _new_job(frame)
    job, api = _words(address, _WORDS), _words(frame[_API], _THREADS + 1)
    request = address + _CALL * _BYTES
    job[_CALL], job[_CALL + 2] = 4 * _BYTES, frame[_CONTEXT]
    job[_CALL + 3] = address + _COUNT * _BYTES
    call(api[_THREADS], request)
    chunks = -(-job[_FEATURES] // job[_CHUNK])
    helpers = min(job[_COUNT], chunks) - 1
    for index in range(_seats(job[_COUNT])):
        if helpers == 0:
            break
        fetch_add(address + _HOLDERS * _BYTES, 1)
        seat = seats_address() + index * _SEAT_BYTES
        if compare_exchange(seat, _WAITING, address) == _WAITING:
            helpers -= 1
        else:
            fetch_add(address + _HOLDERS * _BYTES, -1)
    job[_CALL], job[_CALL + 3], job[_CALL + 4] = 5 * _BYTES, task_address(), address
    for _ in range(helpers):
        fetch_add(address + _HOLDERS * _BYTES, 1)
        if call(api[_SCHEDULE], request) != 0:  # an error: alone, then
            fetch_add(address + _HOLDERS * _BYTES, -1)
            break
    _work(address)
    while load(address + _DONE * _BYTES) < job[_FEATURES]:
        sched_yield()
    _release(address)


@_compile
def _answer_registration(extension: int) -> None:
    """Tell XLA which version of its interface this is."""
    words = _words(extension, 4)
    if words[1] & 0xFFFFFFFF == _METADATA:
        metadata = _words(words[3], 6)
        metadata[_METADATA_VERSION] = _VERSION


@cfunc(types.int64(types.int64), cache=True)
def handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = _words(address, 20)
    if frame[_EXTENSION] != 0:
        _answer_registration(frame[_EXTENSION])
    else:
        _multiply(frame)
    return 0
