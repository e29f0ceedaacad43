"""Files that are read once do not stay in the page cache."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from llama_jax.files.remote import is_remote

_STEP = 2**28  # bytes between two calls of the system
_SHARE = 4  # files smaller than this part of the memory are left there


def forgetting(files: Collection[Path]) -> Callable[[int], None]:
    """A function to call with the number of bytes just read, which removes files from the page cache.

    A copy of a large checkpoint there is of no use, pushes out what other programs read, and costs more
    time than reading from a fast disk. Small files are left alone; so are all where the system does not
    offer this.
    """
    local = [file for file in files if not is_remote(file) and file.exists()]
    size = sum(file.stat().st_size for file in local)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    large = hasattr(os, "posix_fadvise") and size > memory // _SHARE
    since = 0

    def count(nbytes: int) -> None:
        nonlocal since
        since += nbytes
        if large and since >= _STEP:
            since = 0
            for file in local:
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
