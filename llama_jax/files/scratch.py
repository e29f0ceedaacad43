"""Temporary files for what memory cannot hold, in a place that was named for them."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.files.direct import bypass_page_cache, read_all, write_all


class _Place(NamedTuple):
    directory: Path
    nbytes: int


_place: _Place | None = None


@contextmanager
def scratch_in(directory: Path, nbytes: int) -> Iterator[None]:
    """Within, `scratch_file` makes files there.

    Args:
        nbytes: how large one may be.
    """
    global _place
    previous, _place = _place, _Place(directory, nbytes)
    try:
        yield
    finally:
        _place = previous


class ScratchFile:
    """A file without a name, which ends with this object or with the process, however that ends.

    It is not in the page cache, where the system allows that.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptor, name = tempfile.mkstemp(dir=directory)
        weakref.finalize(self, os.close, self._descriptor)
        os.unlink(name)
        bypass_page_cache(self._descriptor)

    def write(self, values: np.ndarray, position: int) -> None:
        """Write whole blocks, of `aligned_bytes`, at a position that is one of a block."""
        write_all(self._descriptor, values, position)

    def read(self, values: np.ndarray, position: int) -> None:
        """Fill whole blocks, of `aligned_bytes`, from such a position."""
        if read_all(self._descriptor, values, position) < values.nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def scratch_file(nbytes: int) -> ScratchFile | None:
    """A temporary file for so many bytes; None where there is no place or not enough of it.

    >>> with scratch_in(Path("."), 2**20):
    ...     [scratch_file(size) is None for size in (2**20, 2**21)]
    [False, True]
    """
    if _place is None or nbytes > _place.nbytes:
        return None
    return ScratchFile(_place.directory)
