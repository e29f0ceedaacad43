"""Access to files that does not pass through the page cache (`O_DIRECT`), where a system has that.

The disk then reads from and writes to the program's own memory: 0.03 ns of processor time a byte, in place
of 0.3 to 2. Positions, lengths and addresses have to be multiples of a block.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.files.buffers import empty
from llama_jax.files.page import PAGE
from llama_jax.files.remote import is_remote

_BUFFER = 2**22  # bytes that are gathered where they are not blocks in memory
_PART = 2**24  # bytes of one request; 4 MB took a disk half as long again
_reading = False


def can_read_directly(file: Path) -> bool:
    """Whether a file is on a system that reads it so; found out by reading its first block."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False  # whoever reads it reports that
    try:
        if not bypass_page_cache(descriptor):
            return False
        os.preadv(descriptor, [aligned_bytes(PAGE).data], 0)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def bypass_page_cache(descriptor: int, on: bool = True) -> bool:
    """Have an open file read and written so from now on, or no longer; False where that is not possible."""
    if not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if on else 0))
    except OSError:
        return False
    return True


def aligned_bytes(nbytes: int) -> np.ndarray:
    """Memory for so many bytes at an address that is a multiple of `PAGE`."""
    memory = empty((nbytes + PAGE,), np.dtype(np.uint8))
    start = -_address(memory) % PAGE
    return memory[start : start + nbytes]


@contextmanager
def reading_directly(on: bool) -> Iterator[None]:
    """Within, large tensors that are whole blocks are read past the page cache; see `reads_directly`."""
    global _reading
    previous, _reading = _reading, on
    try:
        yield
    finally:
        _reading = previous


def reads_directly(path: Path, position: int, values: np.ndarray) -> bool:
    """Whether contiguous `values` at a position of a file are whole blocks, and are to be read so."""
    if not _reading or values.nbytes < _PART or is_remote(path):
        return False
    return not any(number % PAGE for number in (position, values.nbytes, _address(values)))


def read_parts(path: Path, position: int, values: np.ndarray) -> Iterator[np.ndarray]:
    """Fill bytes from a position of a file, and return one part after the other while the next are read.

    Raises:
        EOFError: the file ends before that.
        OSError: it cannot be read.
    """
    starts = deque(range(0, values.nbytes, _PART))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        bypass_page_cache(descriptor)

        def read(start: int) -> np.ndarray:
            part = values[start : start + _PART]
            if _transfer(os.preadv, descriptor, part, position + start) < part.nbytes:
                raise EOFError
            return part

        with ThreadPoolExecutor(2) as pool:
            started: deque[Future[np.ndarray]] = deque()
            while starts or started:
                while starts and len(started) < 3:
                    started.append(pool.submit(read, starts.popleft()))
                yield started.popleft().result()
    finally:
        os.close(descriptor)


def write_all(descriptor: int, values: np.ndarray, position: int) -> None:
    """Write bytes at a position of a file."""
    _transfer(os.pwritev, descriptor, values, position)


def read_all(descriptor: int, values: np.ndarray, position: int) -> int:
    """Fill `values` from a position of a file, and return the number of bytes: fewer at its end."""
    return _transfer(os.preadv, descriptor, values, position)


def _transfer(
    call: Callable[[int, list[Any], int], int],
    descriptor: int,
    values: np.ndarray,
    position: int,
) -> int:
    done = 0
    while done < values.nbytes:
        try:
            count = call(descriptor, [values[done:]], position + done)
        except OSError as error:
            # some systems, or disks with larger blocks, refuse only now
            if error.errno != errno.EINVAL or not bypass_page_cache(descriptor, on=False):
                raise
            count = call(descriptor, [values[done:]], position + done)
        if not count:
            break
        done += count
    return done


class DirectWriter:
    """A new file. Blocks that begin at one in memory are written from there; others are copied first.

    Parts of blocks are left to the page cache.

    Example:
        with DirectWriter(path) as file:
            file.write(array.data)
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._buffer = aligned_bytes(_BUFFER)
        self._position = 0

    def seek(self, position: int) -> None:
        """Write there next."""
        self._position = position

    def write(self, data: Any) -> int:
        """Write an object that has contiguous bytes, and return their number."""
        values = np.frombuffer(data, np.uint8)
        whole = 0 if self._position % PAGE else values.nbytes // PAGE * PAGE
        bypass_page_cache(self._descriptor)
        if _address(values) % PAGE == 0:
            self._write(values[:whole])
        else:
            for start in range(0, whole, _BUFFER):
                part = self._buffer[: min(_BUFFER, whole - start)]
                part[...] = values[start : start + part.nbytes]
                self._write(part)
        bypass_page_cache(self._descriptor, on=False)
        self._write(values[whole:])
        return values.nbytes

    def _write(self, values: np.ndarray) -> None:
        write_all(self._descriptor, values, self._position)
        self._position += values.nbytes

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _address(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])
