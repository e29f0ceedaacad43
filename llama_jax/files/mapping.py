"""Arrays that are parts of files: the system maps their pages, and nothing is copied.

Reading into fresh memory takes eight times as long as `cat` of a file in the page cache (docs/log.md):
the system clears each page and then copies into it. What is mapped shares the pages of the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_AT_THIS_ADDRESS = 0x10  # MAP_FIXED, which the module `mmap` lacks
_FAILED = ctypes.c_void_p(-1).value


class FilePart(NamedTuple):
    """Bytes of a local file."""

    path: Path
    offset: int
    nbytes: int


def can_map(part: FilePart) -> bool:
    """Whether these bytes are complete pages, on a system whose pages can be put anywhere in memory."""
    page = mmap.PAGESIZE
    return sys.platform == "linux" and not (part.offset % page or part.nbytes % page)


def map_parts(parts: Sequence[FilePart]) -> np.ndarray | None:
    """The bytes of all parts, one after the other, or None where the system refuses.

    What is written into the array stays in memory. While it is in use, the files may be replaced or
    removed, but not changed.

    Args:
        parts: of which each `can_map`.

    >>> path = Path("file.bin")
    >>> _ = path.write_bytes(bytes(mmap.PAGESIZE) + b"x" * mmap.PAGESIZE)
    >>> half = FilePart(path, mmap.PAGESIZE, mmap.PAGESIZE)
    >>> int(map_parts([half, half]).sum()) == 2 * mmap.PAGESIZE * ord("x") if can_map(half) else True
    True
    """
    libc = _libc()
    total = sum(part.nbytes for part in parts)
    nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, total, mmap.PROT_READ, nothing, -1, 0)
    if start == _FAILED:
        return None
    region = _Region(start, total)
    weakref.finalize(region, libc.munmap, start, total).atexit = False
    for part in parts:
        with open(part.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), part.offset, part.nbytes, os.POSIX_FADV_WILLNEED)
            # filled while it cannot be written to: else every page would be copied
            how = mmap.MAP_PRIVATE | mmap.MAP_POPULATE | _AT_THIS_ADDRESS
            there = (part.nbytes, mmap.PROT_READ, how, file.fileno(), part.offset)
            if libc.mmap(start, *there) == _FAILED:
                return None
        start += part.nbytes
    libc.mprotect(region.start, total, mmap.PROT_READ | mmap.PROT_WRITE)
    return np.asarray(region)


class _Region:
    """What all views of mapped memory refer to."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.start = start
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (start, False),
        }


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    number, size = ctypes.c_int, ctypes.c_size_t
    address = ctypes.c_void_p
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = address
    libc.munmap.argtypes = (address, size)
    libc.mprotect.argtypes = (address, size, number)
    return libc
