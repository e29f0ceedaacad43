"""One process at a time may run a folder; reading it needs no lock."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder while the block runs; the lock ends with the process, however that ends.

    A file system that has no locks is used without one.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                yield
                return
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            name = f"process {holder}" if holder.isdigit() else "another process"
            raise ValueError(
                f"{folder}: {name} is running it: wait until it ends, or stop it first"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
