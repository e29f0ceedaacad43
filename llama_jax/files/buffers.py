"""Memory of large arrays that is used again while many tensors pass through.

The system clears fresh memory, 0.25 ns a byte, more than reading a file that is in the page cache takes. On
a virtual machine whose host has to provide the memory first, it is ten times that.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from llama_jax.files.memory import resident_memory
from llama_jax.files.page import PAGE, whole_pages

_SMALL = 2**20  # bytes; the allocator itself uses such again
_UNUSED = 4  # MADV_DONTNEED of Linux


class _Arena:
    """One stretch of memory; parts of it are lent, the first that is free and large enough.

    What was never lent is not in memory yet: the system provides pages when they are first written to.
    """

    def __init__(self, nbytes: int) -> None:
        nbytes = whole_pages(nbytes)
        memory = np.empty(nbytes + PAGE, np.uint8)
        start = -memory.__array_interface__["data"][0] % PAGE
        self._memory = memory[start : start + nbytes]  # at a page, as direct writing needs
        self._lent = [(0, 0), (nbytes, nbytes)]  # where parts begin and end, sorted
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """So many bytes; where no free part is large enough, of memory of their own."""
        pages = whole_pages(nbytes)
        with self._lock:
            start = next((start for start, stop in self._free() if stop - start >= pages), None)
            if start is None:
                return np.empty(nbytes, np.uint8)
            part = start, start + pages
            self._lent = sorted([*self._lent, part])
        loan = _Loan(self._memory[slice(*part)])
        # it comes back when no array refers to it any more
        weakref.finalize(loan, self._returned.append, part).atexit = False
        return np.asarray(loan)[:nbytes]

    def release(self, libc: ctypes.CDLL) -> None:
        """Give the system the pages of what is not lent."""
        address = self._memory.__array_interface__["data"][0]
        with self._lock:
            for start, stop in self._free():
                libc.madvise(
                    ctypes.c_void_p(address + start), ctypes.c_size_t(stop - start), _UNUSED
                )

    def _free(self) -> list[tuple[int, int]]:
        while self._returned:
            self._lent.remove(self._returned.popleft())
        return [(end, begin) for (_, end), (begin, _) in pairwise(self._lent) if begin > end]


class _Loan:
    """What all views of a lent part refer to."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__


_arena: _Arena | None = None
# options of glibc's mallopt, with the values that are set and those that it begins with
_MALLOPT = {
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1, 2**17),  # of memory at the end of the heap
    "M_MMAP_MAX": (-4, 0, 2**16),  # of arrays that are not in the heap
    "M_ARENA_MAX": (-8, 1, 0),  # heaps; one of a thread cannot hold large arrays
}


@contextmanager
def reused_buffers(nbytes: int) -> Iterator[None]:
    """Within, arrays of `empty` take over the memory of earlier ones that are no longer in use.

    Args:
        nbytes: the most that is held for that; arrays beyond it have memory of their own.
    """
    global _arena
    previous, _arena = _arena, _Arena(nbytes)
    try:
        yield
    finally:
        _arena = previous


@contextmanager
def kept_heap() -> Iterator[None]:
    """Within, what other libraries free stays in the process, for their next arrays; with glibc only.

    TensorStore needs new memory for each piece of an array that it decodes, twice. Threads that were there
    before keep heaps of their own, in which an array of 64 MB or more gets new memory all the same (glibc
    2.36), so enter this before anything is read.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    for option, value, _ in _MALLOPT.values():
        libc.mallopt(option, value)
    try:
        yield
    finally:
        for option, _, value in _MALLOPT.values():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def release_unused(limit: int) -> None:
    """If the process has more than `limit` bytes of RAM, give back what it holds but does not use.

    With glibc only. What is taken next is new memory again, so this is for the few times when much is held.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or (resident_memory() or 0) <= limit:
        return
    if _arena is not None:
        _arena.release(libc)
    libc.malloc_trim(0)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """As `np.empty`; within `reused_buffers`, of memory that was perhaps used before."""
    arena, nbytes = _arena, math.prod(shape) * np.dtype(dtype).itemsize
    if arena is None or nbytes < _SMALL:
        return np.empty(shape, dtype)
    return arena.take(nbytes).view(dtype).reshape(shape)
