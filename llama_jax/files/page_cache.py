"""Files that are read or written once do not stay in the page cache."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

_STEP = 2**28  # bytes between two calls of the system
_SHARE = 4  # files smaller than this part of the memory are left there


def fits_page_cache(nbytes: int) -> bool:
    """Whether files of so many bytes should be left in the page cache."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return nbytes <= memory // _SHARE


def forgetting(files: Callable[[], Iterable[Path]], size: int) -> Callable[[int], None]:
    """A function to call with the number of bytes just read or written; it empties the page cache of files.

    A copy of a large checkpoint there is of no use, pushes out what other programs read, and costs more
    time than reading from a fast disk. What was written is sent to the disk first. Small files are left
    alone; so are all where the system does not offer this.

    Args:
        files: those that are there by now.
        size: bytes of all of them in the end.
    """
    large = hasattr(os, "posix_fadvise") and not fits_page_cache(size)
    since = 0

    def count(nbytes: int) -> None:
        nonlocal since
        since += nbytes
        if large and since >= _STEP:
            since = 0
            for file in files():
                _forget(file)

    return count


def _forget(file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return  # whoever reads it reports that
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
