"""Read ranges of bytes of local and remote files."""

import io
import os
from pathlib import Path
from typing import Any

from llama_jax.files.remote import file_system, is_remote, name_in, storage_errors

_LEAST = 1 << 16  # bytes of one request
_MOST = 1 << 24  # bytes that are requested ahead
_PIECE = 1 << 22  # of one of several requests at a time


def open_file(path: Path, end: int | None = None) -> io.RawIOBase:
    """Open a file, unbuffered, to read ranges of it: with `seek`, `read` and `readinto`.

    Args:
        path: local, or remote (`llama_jax.files.remote`).
        end: position up to which a remote file is read ahead; None for its end.

    Raises:
        OSError: a local file cannot be opened.
        ValueError: a remote one cannot be read; also on reading.

    >>> path = Path("file.bin")
    >>> _ = path.write_bytes(b"0123456789")
    >>> with open_file(path) as file:
    ...     _ = file.seek(3)
    ...     file.read(2)
    b'34'
    """
    return _RemoteFile(path, end) if is_remote(path) else open(path, "rb", buffering=0)


def file_size(path: Path) -> int:
    """Bytes in a file. Raises the errors of `open_file`."""
    if not is_remote(path):
        return path.stat().st_size
    with storage_errors(path):
        return int(file_system(path).size(name_in(path)))


def fill(file: io.RawIOBase, out: Any) -> int:
    """Read into all of `out`, a writable buffer; fewer bytes at the end of the file. Returns how many."""
    view = memoryview(out).cast("B")
    done = 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def read_bytes(file: io.RawIOBase, count: int) -> bytes:
    """So many bytes from a file's position, or fewer at its end."""
    out = bytearray(count)
    return bytes(out[: fill(file, out)])


class _RemoteFile(io.RawIOBase):
    """A remote file. Successive reads are answered from a window of bytes that were requested ahead.

    The window doubles with each request that continues the one before, so a header costs little and a
    tensor few requests; it is fetched by several requests at a time.
    """

    def __init__(self, path: Path, end: int | None) -> None:
        self._path, self._end = path, end
        self._position = 0
        self._start, self._window = 0, memoryview(b"")
        self._size: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        if self._size is None:
            self._size = file_size(self._path)
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self.size
        if offset < 0:
            raise OSError(f"a position of {offset}")
        self._position = offset
        return offset

    def readinto(self, buffer: Any, /) -> int:
        out = memoryview(buffer).cast("B")
        begin = self._position - self._start
        if not 0 <= begin < len(self._window):
            self._fetch(len(out))
            begin = 0
        count = min(len(out), len(self._window) - begin)
        out[:count] = self._window[begin : begin + count]
        self._position += count
        return count

    def _fetch(self, count: int) -> None:
        """Fill the window from the position on; it stays empty at the end of the file."""
        before = len(self._window)
        follows = before and self._position == self._start + before
        length = max(count, min(2 * before, _MOST) if follows else _LEAST)
        bound = self.size if self._end is None or self._position >= self._end else self._end
        stop = min(self._position + length, bound)
        self._start, self._window = self._position, memoryview(b"")
        if stop <= self._start:
            return
        starts = list(range(self._start, stop, _PIECE))
        stops = [min(start + _PIECE, stop) for start in starts]
        name = name_in(self._path)
        with storage_errors(self._path):
            parts = file_system(self._path).cat_ranges(
                [name] * len(starts), starts, stops, on_error="raise"
            )
        if any(len(part) < _PIECE for part in parts[:-1]):
            raise ValueError(f"{self._path}: ends at another place than before: was it replaced?")
        self._window = memoryview(parts[0] if len(parts) == 1 else b"".join(parts))
