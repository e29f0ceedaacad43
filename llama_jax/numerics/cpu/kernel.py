"""The functions that XLA calls, with the work of a call shared by its threads.

XLA calls a handler with a frame of its C interface (xla/ffi/api/c_api.h in jaxlib). `multiply_handler` is
for x weight^T of one or several weights, `attend_handler` for attention of one query a row. Their items,
which are rows of a weight or heads, are taken in chunks by whichever thread is free: a thread that never
comes is not waited for, as it may itself wait behind this call.
"""

from typing import Any

from numba import njit

from llama_jax.numerics.cpu.attention import attend
from llama_jax.numerics.cpu.block import (
    FEATURES,
    multiply_bfloat16,
    multiply_float32,
    multiply_int4,
    multiply_int8,
)
from llama_jax.numerics.cpu.digits import SIZES, VECTOR_BYTES, multiply_digits, split
from llama_jax.numerics.cpu.exported import exported
from llama_jax.numerics.cpu.frame import (
    ARGUMENT_COUNT,
    ARGUMENTS,
    BFLOAT16,
    BUFFER_DTYPE,
    BYTES,
    DATA,
    DIMENSIONS,
    EXTENSION,
    FLOAT32,
    INT8,
    RESULTS,
    UINT8,
    answer_registration,
    words,
)
from llama_jax.numerics.cpu.machine import (
    call,
    calloc,
    compare_exchange,
    exchange,
    fetch_add,
    load,
    sched_yield,
    symbol_address,
)
from llama_jax.numerics.cpu.processor import HAS_VNNI
from llama_jax.numerics.cpu.seats import SEAT_BYTES, SEATS, SYMBOL
from llama_jax.numerics.cpu.threads import (
    DONE,
    HOLDERS,
    NEXT,
    REQUEST_WORDS,
    release,
    schedule,
    thread_count,
)

# A job is what the threads of a call share, words of 8 bytes at these places. Behind them are the operands
# of attention, or of each weight, and for one row of x and 4-bit codes the digits of x and its sums over
# groups.
_ITEMS, _CHUNK = 3, 4
_WEIGHTS, _DTYPE = 5, 6  # count of weights, 0 for attention; dtype of the keys
_REQUEST = 7  # of XLA
_COUNT = _REQUEST + REQUEST_WORDS - 1  # of its threads
_HEADER = _REQUEST + REQUEST_WORDS
_OF_WEIGHT, _OF_ATTENTION = 13, 9  # words
# of a weight: the dtype of its codes, its first item, and what `block.Operands` has
_CODES_DTYPE, _FIRST, _CODES, _X, _SCALE, _ZERO, _OUT = 0, 1, 2, 3, 4, 5, 6
_ROWS, _IN, _FEATURES, _GROUPS, _DIGITS, _SUMS = 7, 8, 9, 10, 11, 12
_ALIGNMENT = 64

# A thread that has worked looks into a seat for its next job so many times, since to wake one can take
# longer than a call; in between others may run. A seat has the address of a job, or one of these.
_PATIENCE = 3000
_FREE, _WAITING = 0, 1

# Numbers to multiply with of the smallest chunk: enough that taking it costs nothing, few enough that
# threads end together. Chunks are larger while much is left, since what is fetched ahead of a thread ends
# up in the wrong cache where another one goes on.
_CHUNK_NUMBERS = 1 << 15

# Sums in any order, so that they are vectors. NaN and infinity stay what they are.
_compile = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")


@_compile
def _in_blocks(count: int) -> int:
    """At most so many rows of a weight, which the kernel computes with in blocks."""
    return count // FEATURES * FEATURES


@exported("llama_jax_work")
def work(address: int) -> int:
    """Take chunks, each a part of what is left, until nothing is."""
    job = words(address)
    while True:
        begin = load(address + NEXT * BYTES)
        rest = job[_ITEMS] - begin
        if rest <= 0:
            return 0
        end = begin + min(max(_in_blocks(rest // (2 * job[_COUNT])), job[_CHUNK]), rest)
        if compare_exchange(address + NEXT * BYTES, begin, end) != begin:
            continue
        if job[_WEIGHTS] == 0:
            of = words(address + _HEADER * BYTES)
            attention = (of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], of[8])
            attend(attention, job[_DTYPE] == BFLOAT16, begin, end)
        for index in range(job[_WEIGHTS]):
            # rows are counted on from one weight to the next
            of = words(address + (_HEADER + index * _OF_WEIGHT) * BYTES)
            first = max(begin - of[_FIRST], 0)
            last = min(end - of[_FIRST], of[_FEATURES])
            if first >= last:
                continue
            operands = (
                of[_CODES],
                of[_X],
                of[_SCALE],
                of[_ZERO],
                of[_OUT],
                of[_ROWS],
                of[_IN],
                of[_FEATURES],
                of[_GROUPS],
            )
            if of[_DIGITS] != 0:
                by_digits = (
                    of[_CODES],
                    of[_DIGITS],
                    of[_SCALE],
                    of[_ZERO],
                    of[_SUMS],
                    of[_OUT],
                    of[_IN],
                    of[_GROUPS],
                )
                multiply_digits(by_digits, first, last)
            elif of[_CODES_DTYPE] == BFLOAT16:
                multiply_bfloat16(operands, first, last)
            elif of[_CODES_DTYPE] == FLOAT32:
                multiply_float32(operands, first, last)
            elif of[_CODES_DTYPE] == INT8:
                multiply_int8(operands, first, last)
            else:
                multiply_int4(operands, first, last)
        fetch_add(address + DONE * BYTES, end - begin)


@_compile
def _seats(threads: int) -> int:
    """For threads that wait: half of XLA's, which has work of its own between calls."""
    return min(threads // 2, SEATS)


seats_address = symbol_address(SYMBOL)


@_compile
def _wait_for_job(seats: int) -> int:
    """The job of a call that comes soon, or 0; with a seat for as long, if one is free."""
    for index in range(seats):
        seat = seats_address() + index * SEAT_BYTES
        if compare_exchange(seat, _FREE, _WAITING) == _FREE:
            for _ in range(_PATIENCE):
                if load(seat) != _WAITING:
                    break
                sched_yield()
            job = exchange(seat, _FREE)
            return 0 if job == _WAITING else job
    return 0


@exported("llama_jax_task")
def task(address: int) -> int:
    """What another thread of XLA does for a call, and for those that follow at once."""
    while address != 0:
        seats = _seats(words(address)[_COUNT])
        call(work(), address)
        release(address)
        address = _wait_for_job(seats)
    return 0


@_compile
def _vectors(depth: int) -> int:
    return (depth + 127) // 128


@_compile
def _digit_bytes(depth: int) -> int:
    """For digits of x and its sums over groups of at least 32."""
    return _vectors(depth) * (VECTOR_BYTES + _ALIGNMENT)


@_compile
def _is_for_digits(depth: int, groups: int) -> bool:
    size = depth // groups
    return size == SIZES[0] or size == SIZES[1] or size == SIZES[2]


@_compile
def _new_job(size: int, scratch: int, weights: int) -> int:
    address = calloc(size * BYTES + scratch, 1)
    job = words(address)
    job[HOLDERS], job[_WEIGHTS] = 1, weights
    return address


@_compile
def _buffer(frame: Any, table: int, index: int) -> Any:
    """An argument or a result."""
    return words(words(frame[table])[index])


@_compile
def _new_multiplication(frame: Any) -> int:
    """Of x [rows, in] and for each weight codes [features, ...], scale [features, groups] and zero."""
    weights = (frame[ARGUMENT_COUNT] - 1) // 3
    x = _buffer(frame, ARGUMENTS, 0)
    shape = words(x[DIMENSIONS])
    size = _HEADER + weights * _OF_WEIGHT
    scratch = _digit_bytes(shape[1]) * weights if shape[0] == 1 and HAS_VNNI else 0
    address = _new_job(size, scratch + _ALIGNMENT, weights)
    job = words(address)
    place = (address + size * BYTES + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    for index in range(weights):
        codes = _buffer(frame, ARGUMENTS, 3 * index + 1)
        scale = _buffer(frame, ARGUMENTS, 3 * index + 2)
        of = job[_HEADER + index * _OF_WEIGHT :]
        of[_CODES_DTYPE] = codes[BUFFER_DTYPE] & 0xFFFFFFFF
        of[_FIRST] = job[_ITEMS]
        of[_X], of[_CODES], of[_SCALE] = x[DATA], codes[DATA], scale[DATA]
        of[_ZERO] = _buffer(frame, ARGUMENTS, 3 * index + 3)[DATA]
        of[_OUT] = _buffer(frame, RESULTS, index)[DATA]
        of[_ROWS], of[_IN], of[_GROUPS] = shape[0], shape[1], words(scale[DIMENSIONS])[1]
        of[_FEATURES] = words(codes[DIMENSIONS])[0]
        if of[_CODES_DTYPE] == UINT8 and scratch > 0 and _is_for_digits(shape[1], of[_GROUPS]):
            before = job[_HEADER + (index - 1) * _OF_WEIGHT :]
            if index > 0 and before[_DIGITS] != 0 and before[_GROUPS] == of[_GROUPS]:
                of[_DIGITS], of[_SUMS] = before[_DIGITS], before[_SUMS]
            else:
                of[_DIGITS], of[_SUMS] = place, place + _vectors(shape[1]) * VECTOR_BYTES
                split(of[_X], of[_DIGITS], of[_SUMS], shape[1], of[_GROUPS])
                place += _digit_bytes(shape[1])
        job[_ITEMS] += of[_FEATURES]
    job[_CHUNK] = max(FEATURES, _in_blocks(_CHUNK_NUMBERS // shape[1]))
    return address


@_compile
def _new_attention(frame: Any) -> int:
    """Of one query a row, see `attention.Operands`."""
    query, keys = _buffer(frame, ARGUMENTS, 0), _buffer(frame, ARGUMENTS, 1)
    address = _new_job(_HEADER + _OF_ATTENTION, 0, 0)
    job = words(address)
    of = job[_HEADER:]
    for index in range(4):
        of[index] = _buffer(frame, ARGUMENTS, index)[DATA]
    of[4] = _buffer(frame, RESULTS, 0)[DATA]
    shape, cached = words(query[DIMENSIONS]), words(keys[DIMENSIONS])
    of[5], of[6], of[7], of[8] = shape[1], cached[0] // shape[0], cached[1], cached[2]
    job[_DTYPE] = keys[BUFFER_DTYPE] & 0xFFFFFFFF
    job[_ITEMS] = shape[0] * shape[1]
    job[_CHUNK] = max(1, _CHUNK_NUMBERS // (2 * cached[1] * cached[2]))
    return address


@_compile
def _share(frame: Any, address: int) -> None:
    """Do the work of a job, with the help of other threads, and free it."""
    job, request = words(address), address + _REQUEST * BYTES
    threads = thread_count(frame, request)
    chunks = -(-job[_ITEMS] // job[_CHUNK])
    helpers = min(threads, chunks) - 1
    for index in range(_seats(threads)):
        if helpers == 0:
            break
        fetch_add(address + HOLDERS * BYTES, 1)
        seat = seats_address() + index * SEAT_BYTES
        if compare_exchange(seat, _WAITING, address) == _WAITING:
            helpers -= 1
        else:
            fetch_add(address + HOLDERS * BYTES, -1)
    schedule(frame, request, task(), address, helpers)
    call(work(), address)
    while load(address + DONE * BYTES) < job[_ITEMS]:
        sched_yield()
    release(address)


@exported("llama_jax_few_rows")
def multiply_handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = words(address)
    if frame[EXTENSION] != 0:
        answer_registration(frame[EXTENSION])
    else:
        _share(frame, _new_multiplication(frame))
    return 0


@exported("llama_jax_one_query")
def attend_handler(address: int) -> int:
    """An XLA_FFI_Handler; returns no error."""
    frame = words(address)
    if frame[EXTENSION] != 0:
        answer_registration(frame[EXTENSION])
    else:
        _share(frame, _new_attention(frame))
    return 0
