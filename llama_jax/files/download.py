"""Local copies of remote files, for libraries that read nothing else."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.files.remote import file_system, is_remote, name_in, storage_errors

# what file systems call the version of a file, or when it was written
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "mtime", "LastModified", "created")


class _File(NamedTuple):
    name: str
    size: int
    version: tuple[Any, ...]


def on_disk(path: Path) -> Path:
    """`path` itself or, for a remote file or directory, a copy that lasts as long as the process.

    The copy is in a new directory of `tempfile.gettempdir()`, which TMPDIR sets; if any file has changed
    since, there is another copy.

    Raises:
        ValueError: nothing there, or it cannot be read; too little disk.
        OSError: the disk is full or broken.
    """
    if not is_remote(path):
        return path
    store, name = file_system(path), name_in(path)
    with storage_errors(path):
        infos = store.find(name, detail=True) if store.isdir(name) else {name: store.info(name)}
    files = [
        _File(file, int(info["size"] or 0), tuple(map(info.get, _VERSIONS)))
        for file, info in infos.items()
    ]
    return _copy(path, tuple(files))


@cache
def _copy(path: Path, files: tuple[_File, ...]) -> Path:
    store, name = file_system(path), name_in(path)
    needed = sum(file.size for file in files)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        raise ValueError(
            f"{path}: needs a local copy of {needed} bytes, but {tempfile.gettempdir()} has {free} free; "
            "set TMPDIR to a larger disk"
        )
    directory = Path(tempfile.mkdtemp(prefix="llama_jax."))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    copy = directory / path.name
    with storage_errors(path):
        for file, _, _ in files:
            local = copy / file.removeprefix(name).lstrip("/") if file != name else copy
            if not local.resolve().is_relative_to(directory.resolve()):
                raise ValueError(f"{path}: has a file named {file!r}, which would leave the copy")
            local.parent.mkdir(parents=True, exist_ok=True)
            if not file.endswith("/"):  # an empty object that stands for a folder
                store.get_file(file, str(local))
    return copy
