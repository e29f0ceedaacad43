"""How a call shares its work with XLA's threads.

A job is words of 8 bytes that begin with `NEXT`, `DONE` and `HOLDERS`. A request is words within it, with
which XLA's functions are called; the last of them is the number of threads.
"""

from typing import Any

from numba import njit

from llama_jax.numerics.cpu.frame import API, BYTES, CONTEXT, SCHEDULE, THREADS, words
from llama_jax.numerics.cpu.machine import call, fetch_add, free, load, sched_yield

NEXT, DONE, HOLDERS = 0, 1, 2  # parts taken and computed; threads that hold the job
REQUEST_WORDS = 6

_compile = njit(error_model="numpy")  # kept as a part of what calls it


@_compile
def thread_count(frame: Any, request: int) -> int:
    """The threads that XLA has for a call."""
    of, api = words(request), words(frame[API])
    of[0], of[2] = 4 * BYTES, frame[CONTEXT]
    of[3] = request + (REQUEST_WORDS - 1) * BYTES
    call(api[THREADS], request)
    return of[REQUEST_WORDS - 1]


@_compile
def schedule(frame: Any, request: int, task: int, address: int, count: int) -> None:
    """Have other threads call the function `task` with the job at `address`, after `thread_count`."""
    of, api = words(request), words(frame[API])
    of[0], of[3], of[4] = 5 * BYTES, task, address
    for _ in range(count):
        fetch_add(address + HOLDERS * BYTES, 1)
        if call(api[SCHEDULE], request) != 0:  # an error: alone, then
            fetch_add(address + HOLDERS * BYTES, -1)
            return


@_compile
def release(address: int) -> None:
    """The last holder frees the job."""
    if fetch_add(address + HOLDERS * BYTES, -1) == 1:
        free(address)


@_compile
def share(frame: Any, address: int, request: int, parts: int, work: int, task: int) -> None:
    """Compute the parts of a job with XLA's threads, after `thread_count`, and free it.

    Args:
        work: the function that takes parts, and that this thread calls.
        task: what other threads call: `work`, and then `release`.
    """
    threads = words(request)[REQUEST_WORDS - 1]
    schedule(frame, request, task, address, min(threads, parts) - 1)
    call(work, address)
    while load(address + DONE * BYTES) < parts:
        sched_yield()
    release(address)
