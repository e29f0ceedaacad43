"""x weight^T for few rows x: the function that XLA calls, with the work of a call shared by its threads.

XLA calls `handler` with a frame of its C interface (xla/ffi/api/c_api.h in jaxlib). Rows of the weight are
taken in chunks by whichever thread is free: a thread that never comes is not waited for, as it may itself
wait behind this call.
"""

from typing import Any

import numpy as np
from llvmlite import binding
from numba import carray, cfunc, njit, types

from llama_jax.numerics.cpu.machine import (
    TASK,
    call,
    fetch_add,
    float_of_bfloat16,
    float_of_high_code,
    float_of_low_code,
    free,
    malloc,
    pointer,
    sched_yield,
    task_address,
)

# A job is what the threads of a call share, words of 8 bytes at these places.
_NEXT, _DONE, _HOLDERS = 0, 1, 2  # weight rows taken and computed; threads that hold the job
_DTYPE, _X, _CODES, _SCALE, _ZERO, _OUT = 3, 4, 5, 6, 7, 8  # dtype of the codes, addresses
_ROWS, _IN, _FEATURES, _GROUPS, _CHUNK = 9, 10, 11, 12, 13
_CALL, _COUNT = 14, 19  # arguments for XLA
_WORDS = 20
_BYTES = 8

# Places in XLA's structures, in words.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS = 1, 2, 3, 9, 14  # of a frame
_SCHEDULE, _THREADS = 17, 18  # functions of the API
_BUFFER_DTYPE, _DATA, _DIMENSIONS = 2, 3, 5
_METADATA, _METADATA_VERSION = 1, 3  # kind of extension; version in the metadata
_INT8, _FLOAT32, _BFLOAT16 = 2, 11, 16  # the other dtype is uint8, with two codes each
_VERSION = 0 | 3 << 32  # major 0, minor 3

# Weights of a chunk: enough that taking it costs nothing, few enough that threads end together.
_CHUNK_WEIGHTS = 1 << 15

# Sums in any order, so that they are vectors. NaN and infinity stay what they are.
_compile = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=True)


@_compile
def _words(address: int, count: int) -> Any:
    return carray(pointer(address), (count,), np.int64)


# Indices that begin at 0 are known not to be negative, without which loops would not become vectors.


@_compile
def _multiply_bfloat16(job: Any, begin: int, end: int) -> None:
    rows, features, depth = job[_ROWS], job[_FEATURES], job[_IN]
    x = carray(pointer(job[_X]), (rows, depth), np.float32)
    out = carray(pointer(job[_OUT]), (rows, features), np.float32)
    weight = carray(pointer(job[_CODES]), (features, depth), np.uint16)
    for feature in range(begin, end):
        for row in range(rows):
            total = np.float32(0)
            for column in range(depth):
                total += float_of_bfloat16(weight[feature, column]) * x[row, column]
            out[row, feature] = total


@_compile
def _multiply_float32(job: Any, begin: int, end: int) -> None:
    rows, features, depth = job[_ROWS], job[_FEATURES], job[_IN]
    x = carray(pointer(job[_X]), (rows, depth), np.float32)
    out = carray(pointer(job[_OUT]), (rows, features), np.float32)
    weight = carray(pointer(job[_CODES]), (features, depth), np.float32)
    for feature in range(begin, end):
        for row in range(rows):
            total = np.float32(0)
            for column in range(depth):
                total += weight[feature, column] * x[row, column]
            out[row, feature] = total


@_compile
def _multiply_int8(job: Any, begin: int, end: int) -> None:
    rows, features, groups = job[_ROWS], job[_FEATURES], job[_GROUPS]
    size = job[_IN] // groups
    x = carray(pointer(job[_X]), (rows, groups, size), np.float32)
    out = carray(pointer(job[_OUT]), (rows, features), np.float32)
    codes = carray(pointer(job[_CODES]), (features, groups, size), np.int8)
    scale = carray(pointer(job[_SCALE]), (features, groups), np.float32)
    for feature in range(begin, end):
        for row in range(rows):
            total = np.float32(0)
            for group in range(groups):
                part = np.float32(0)
                for column in range(size):
                    part += np.float32(codes[feature, group, column]) * x[row, group, column]
                total += part * scale[feature, group]
            out[row, feature] = total


@_compile
def _multiply_int4(job: Any, begin: int, end: int) -> None:
    rows, features, groups = job[_ROWS], job[_FEATURES], job[_GROUPS]
    half = job[_IN] // groups // 2
    x = carray(pointer(job[_X]), (rows, groups, 2, half), np.float32)
    out = carray(pointer(job[_OUT]), (rows, features), np.float32)
    codes = carray(pointer(job[_CODES]), (features, groups, half), np.uint8)
    scale = carray(pointer(job[_SCALE]), (features, groups), np.float32)
    zero = carray(pointer(job[_ZERO]), (features, groups), np.float32)
    sums = np.zeros((rows, groups), np.float32)  # to multiply with zeros
    for row in range(rows):
        for group in range(groups):
            for column in range(half):
                sums[row, group] += x[row, group, 0, column] + x[row, group, 1, column]
    for feature in range(begin, end):
        for row in range(rows):
            total = np.float32(0)
            for group in range(groups):
                part = np.float32(0)
                for column in range(half):
                    code = codes[feature, group, column]
                    part += float_of_low_code(code) * x[row, group, 0, column]
                    part += float_of_high_code(code) * x[row, group, 1, column]
                total += part * scale[feature, group] + zero[feature, group] * sums[row, group]
            out[row, feature] = total


@_compile
def _work(address: int) -> None:
    """Take chunks until none is left."""
    job = _words(address, _WORDS)
    while True:
        begin = fetch_add(address + _NEXT * _BYTES, job[_CHUNK])
        if begin >= job[_FEATURES]:
            return
        end = min(begin + job[_CHUNK], job[_FEATURES])
        if job[_DTYPE] == _BFLOAT16:
            _multiply_bfloat16(job, begin, end)
        elif job[_DTYPE] == _FLOAT32:
            _multiply_float32(job, begin, end)
        elif job[_DTYPE] == _INT8:
            _multiply_int8(job, begin, end)
        else:
            _multiply_int4(job, begin, end)
        fetch_add(address + _DONE * _BYTES, end - begin)


@_compile
def _release(address: int) -> None:
    """The last holder frees the job."""
    if fetch_add(address + _HOLDERS * _BYTES, -1) == 1:
        free(address)


@cfunc(types.void(types.int64), cache=True)
def task(address: int) -> None:
    """What another thread of XLA does for a call."""
    _work(address)
    _release(address)


binding.add_symbol(TASK, task.address)


@_compile
def _new_job(frame: Any) -> int:
    """The job of a call of x [rows, in], codes [features, ...], scale [features, groups] and zero."""
    address = malloc(_WORDS * _BYTES)
    job = _words(address, _WORDS)
    job[:] = 0
    arguments, results = _words(frame[_ARGUMENTS], 4), _words(frame[_RESULTS], 1)
    x, codes = _words(arguments[0], 6), _words(arguments[1], 6)
    scale, zero = _words(arguments[2], 6), _words(arguments[3], 6)
    shape = _words(x[_DIMENSIONS], 2)
    job[_DTYPE] = codes[_BUFFER_DTYPE] & 0xFFFFFFFF
    job[_X], job[_CODES], job[_SCALE] = x[_DATA], codes[_DATA], scale[_DATA]
    job[_ZERO], job[_OUT] = zero[_DATA], _words(results[0], 6)[_DATA]
    job[_ROWS], job[_IN] = shape[0], shape[1]
    job[_FEATURES] = _words(codes[_DIMENSIONS], 1)[0]
    job[_GROUPS] = _words(scale[_DIMENSIONS], 2)[1]
    job[_CHUNK] = max(1, _CHUNK_WEIGHTS // job[_IN])
    job[_HOLDERS] = 1
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
    job[_CALL], job[_CALL + 3], job[_CALL + 4] = 5 * _BYTES, task_address(), address
    for _ in range(helpers):
        fetch_add(address + _HOLDERS * _BYTES, 1)
        if call(api[_SCHEDULE], request) != 0:  # an error: alone, then
            fetch_add(address + _HOLDERS * _BYTES, -1)
            break
    _work(address)
    while fetch_add(address + _DONE * _BYTES, 0) < job[_FEATURES]:
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
