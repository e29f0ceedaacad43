"""Write to another file system: local files are uploaded, checked, and count only once all are there.

Object stores cannot rename a folder. So `.NAME.partial` is put beside `NAME` first and removed last, and
`source_path` refuses what has it. Other programs look for config.json, which is the last file of a folder.
"""

import hashlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_jax.files.paths import destination_path, local_path, marker_of
from llama_jax.files.reading import open_file
from llama_jax.files.remote import file_system, name_in, remote_path, storage_errors
from llama_jax.files.staging import staging_in

_CHUNK = 1 << 22
_LAST = "config.json"
_WITHOUT_DIRECTORIES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")


def require_absent(path: Path) -> None:
    """Raise ValueError if there is something at a remote path, unless an interrupted upload has left it."""
    with storage_errors(path):
        file_system(path).invalidate_cache()
        exists = path.exists() and not marker_of(path).exists()
    if exists:
        raise ValueError(f"{path}: exists already; choose another name or remove it")


@contextmanager
def uploading(path: Path) -> Iterator[Callable[..., None]]:
    """Claim a remote path, before the work whose result will be there.

    What an interrupted upload has left there is removed.

    Yields:
        A function to be called once, `upload(local, progress=None, verify=True)`, that uploads a file or
        all files of a directory. With `verify`, each is read back and its SHA-256 compared. `progress` is
        called with the numbers of bytes uploaded, then read back.

    Raises:
        ValueError: something is there already; it cannot be written; another process has claimed the path
            meanwhile; a file is not read back as it was uploaded.
    """
    require_absent(path)
    store, marker, claim = file_system(path), marker_of(path), uuid.uuid4().hex.encode()
    with storage_errors(path):
        _remove(path)
        _write(marker, claim)

    def is_claimed() -> bool:
        store.invalidate_cache()
        try:
            content: bytes = store.cat_file(name_in(marker))
        except FileNotFoundError:
            return False
        return content == claim

    def require_claim() -> None:
        if not is_claimed():
            raise ValueError(
                f"{path}: another process writes there too, or has removed {marker.name}"
            )

    def upload(
        local: Path, progress: Callable[[int], None] | None = None, *, verify: bool = True
    ) -> None:
        progress = progress or (lambda count: None)
        files = _files(local)
        with storage_errors(path):
            for name, file in files.items():
                require_claim()
                _put(file, path / name if name else path, progress)
            if verify:
                for name, file in files.items():
                    _compare(file, path / name if name else path, progress)
            require_claim()
            if len(store.find(name_in(path))) != len(files):
                raise ValueError(f"{path}: has files of another process")
            store.rm_file(name_in(marker))

    try:
        yield upload
    except BaseException:
        with suppress(Exception):
            if is_claimed():
                _remove(path)
                store.rm_file(name_in(marker))
        raise
    finally:
        store.invalidate_cache()


@contextmanager
def output_directory(path: str | Path) -> Iterator[Path]:
    """A local directory to write to: `path` itself or, for a remote path, one to upload.

    It is uploaded when the block ends without an error.

    Raises:
        ValueError: as `uploading`.
    """
    if (remote := remote_path(path)) is None:
        yield local_path(path)
        return
    target = destination_path(remote)
    with (
        uploading(target) as upload,
        staging_in(Path(tempfile.gettempdir()), target.name) as staging,
    ):
        directory = staging / target.name
        directory.mkdir()
        yield directory
        upload(directory)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small remote file, or replace it. Raises ValueError if that is not possible."""
    with storage_errors(path):
        _write(path, content)


def remove(path: Path) -> None:
    """Remove a remote file or folder; it is incomplete from the beginning, for `source_path` refuses it.

    Raises ValueError if that is not possible.
    """
    marker = marker_of(path)
    with storage_errors(path):
        _write(marker, b"removed")
        _remove(path)
        file_system(path).rm_file(name_in(marker))


def _write(path: Path, content: bytes) -> None:
    _make_parent(path)
    file_system(path).pipe_file(name_in(path), content)


def _files(local: Path) -> dict[str, Path]:
    """The files to upload by their names in the folder ("" for one file), the largest first."""
    if local.is_file():
        return {"": local}
    files = [file for file in local.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (file.name == _LAST, -file.stat().st_size))
    return {file.relative_to(local).as_posix(): file for file in files}


def _put(local: Path, path: Path, progress: Callable[[int], None]) -> None:
    size = local.stat().st_size
    _make_parent(path)
    options = {}
    if str(path).startswith(("s3:", "s3a:")):
        # s3fs would hold ten parts of 50 MB; a file has at most 10,000
        options = {"chunksize": max(1 << 23, -(-size // 5000))}
    file_system(path).put_file(str(local), name_in(path), **options)
    progress(size)


def _make_parent(path: Path) -> None:
    """Make the directory of a file, where there are directories; s3fs would create a missing bucket."""
    if str(path).partition(":")[0] not in _WITHOUT_DIRECTORIES:
        file_system(path).makedirs(name_in(path.parent), exist_ok=True)


def _compare(local: Path, path: Path, progress: Callable[[int], None]) -> None:
    digests = []
    for each in (local, path):
        digest = hashlib.sha256()
        with open_file(each) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                progress(len(chunk) if each is path else 0)
        digests.append(digest.digest())
    if digests[0] != digests[1]:
        raise ValueError(f"{path}: was read back with other bytes than were uploaded")


def _remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it; there may be none."""
    store = file_system(path)
    store.invalidate_cache()
    with suppress(FileNotFoundError):
        store.rm(name_in(path), recursive=True)
