"""Memory of large arrays that is used again while many tensors pass through.

The system clears fresh memory, 0.25 ns a byte, more than reading a file that is in the page cache takes. On
a virtual machine whose host has to provide the memory first, it is several times that.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_SMALL = 2**20  # bytes; the allocator itself uses such again
_MOST = 1.25  # times the bytes asked for, for what is beyond them adds to the peak


class _Pool:
    """Lends buffers; one comes back when no array refers to it any more."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lent = self._most_lent = 0  # bytes
        self._returned: deque[np.ndarray] = deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """So many bytes of a buffer that has hardly more."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
                self._lent -= self._free[-1].nbytes
            self._free.sort(key=lambda free: free.nbytes)
            fits = [nbytes <= free.nbytes <= _MOST * nbytes for free in self._free]
            fitting = self._free.pop(fits.index(True)) if any(fits) else None
            self._lent += nbytes if fitting is None else fitting.nbytes
            self._most_lent = max(self._most_lent, self._lent)
            while sum(free.nbytes for free in self._free) > self._most_lent - self._lent:
                self._free.pop()
            buffer = np.empty(nbytes, np.uint8) if fitting is None else fitting
        loan = _Loan(buffer.__array_interface__)
        weakref.finalize(loan, self._returned.append, buffer).atexit = False
        return np.asarray(loan)[:nbytes]


class _Loan:
    """What all views of a lent buffer refer to."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


_pool: _Pool | None = None


@contextmanager
def reused_buffers() -> Iterator[None]:
    """Within, arrays of `empty` take over the memory of earlier ones that are no longer in use.

    No more is held than was in use at once before.
    """
    global _pool
    previous, _pool = _pool, _Pool()
    try:
        yield
    finally:
        _pool = previous


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """As `np.empty`; within `reused_buffers`, of memory that was perhaps used before."""
    pool, nbytes = _pool, math.prod(shape) * np.dtype(dtype).itemsize
    if pool is None or nbytes < _SMALL:
        return np.empty(shape, dtype)
    return pool.take(nbytes).view(dtype).reshape(shape)
