"""Files with code that a program keeps for its next start.

What is read there is executed. So only this user may write to the folder, and each file has a checksum.
"""

import hashlib
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

_MOST_FILES = 16  # of a folder; what was not used for longest goes first
_SUM_BYTES = 32


def read_code(file: Path) -> Any:
    """What `write_code` wrote; None if it is not there, damaged, or anybody else could have written it.

    Raises:
        OSError: it cannot be read.
    """
    if not file.exists() or not _is_private(file.parent):
        return None
    data = file.read_bytes()
    if hashlib.sha256(data[_SUM_BYTES:]).digest() != data[:_SUM_BYTES]:
        return None
    with suppress(OSError):  # a folder that can only be read
        os.utime(file)
    return pickle.loads(data[_SUM_BYTES:])


def write_code(file: Path, content: Any) -> None:
    """Write an object that can be pickled. Raises OSError."""
    folder, data = file.parent, pickle.dumps(content)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = folder / f".{file.name}.{os.getpid()}"  # others may write it at the same time
    try:
        staged.write_bytes(hashlib.sha256(data).digest() + data)
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)
    newest_first = sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
    for old in newest_first[_MOST_FILES:]:
        old.unlink()


def _is_private(folder: Path) -> bool:
    """Whether nobody but this user can write there."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
