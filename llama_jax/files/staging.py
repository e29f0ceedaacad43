"""Write files and directories beside their final name and rename them when complete."""

import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llama_jax.files.download import on_disk

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, the error of a full disk names `path`.

    A failed `write` names no file, and the temporary file would mean nothing to the user.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def staging_in(parent: Path, name: str) -> Iterator[Path]:
    """A temporary directory in `parent` for what will become `name`; it is removed at the end.

    It is locked while in use, so leftovers of killed processes can be recognized and removed.
    """
    for leftover in parent.glob(f".{glob.escape(name)}.*.partial"):
        abandoned = _lock(leftover)
        if abandoned is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(abandoned)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent))
    lock = _lock(staging)
    try:
        with writing(parent / name):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def staged_directory(
    directory: Path, *, into_existing: bool, stale: Iterable[str] = ()
) -> Iterator[Path]:
    """A temporary directory whose files become `directory` when the block ends without an error.

    A new `directory` appears by one rename. Into an existing one the files are moved one by one,
    config.json last. All of them are flushed to disk first.

    Args:
        into_existing: whether `directory` may exist. New files then replace those of the same name and the
            weights of an earlier save; other files are left alone.
        stale: names of further files of an earlier save, removed if they are not replaced.

    Raises:
        FileExistsError: `directory` exists and must not, or is not a directory.
    """
    directory = directory.absolute()  # '.' has no name
    if into_existing and directory.is_dir():
        # inside it, because a mount point or a link may be on another disk than its parent
        with staging_in(directory, directory.name) as staging:
            yield staging
            to_disk(staging)
            names = sorted(os.listdir(staging), key=lambda name: name == "config.json")
            for name in names:
                os.replace(staging / name, directory / name)
            remove_stale(directory, keep=[directory / name for name in names])
            for name in set(stale) - set(names):
                (directory / name).unlink(missing_ok=True)
        return
    created = _make_parents(directory)
    try:
        with staging_in(directory.parent, directory.name) as staging:
            yield staging
            to_disk(staging)
            staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            move(staging, directory)
    except BaseException:
        for parent in created:
            parent.rmdir()
        raise


def move(staged: Path, final: Path) -> None:
    """Rename a complete file or directory. Raises FileExistsError if the target exists by now."""
    if os.path.lexists(final):
        # rename would silently replace a file or an empty directory
        raise FileExistsError(f"{final}: exists, expected it to be absent")
    staged.rename(final)


def to_disk(path: Path) -> None:
    """Flush a file to disk, or a directory with everything in it."""
    for entry in (*path.rglob("*"), path) if path.is_dir() else (path,):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 without changing line ends, and flush it to disk."""
    path.parent.mkdir(exist_ok=True)
    with writing(path), path.open("w", encoding="utf-8", newline="") as file:
        try:
            file.write(text)
            file.flush()
            if path.is_file():  # devices and pipes cannot be flushed
                os.fsync(file.fileno())
        except OSError:
            if path.is_file():
                path.unlink()  # an incomplete file is worse than none
            raise


def copy_file(source: Path, destination: Path) -> None:
    """Copy a file; `destination` appears, or is replaced, once the copy is complete.

    Unlike with `replacing`, a link is replaced itself: the file it points to may belong to another model.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    staged = destination.with_name(f".{destination.name}.partial")
    try:
        with writing(destination):
            shutil.copyfile(on_disk(source), staged)
        os.replace(staged, destination)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to `path` when the block ends without an error.

    If `path` is a link, the file it points to is replaced. A device or a pipe is written directly: a rename
    would put a file in its place.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        with writing(path):
            yield path
        return
    final = Path(os.path.realpath(path)) if path.is_symlink() else path
    staged = final.with_name(f".{final.name}.partial")
    try:
        with writing(path):
            yield staged
        staged.replace(final)
    except OSError as error:
        if error.filename in (staged, str(staged)):  # a name that the user does not know
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        with suppress(OSError):
            staged.unlink()


def _lock(directory: Path) -> int | None:
    """An open, locked descriptor; None if another process holds the lock."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _make_parents(directory: Path) -> list[Path]:
    """Make the missing parents and return them, the innermost first."""
    missing = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def remove_stale(directory: Path, keep: Iterable[Path]) -> None:
    """Remove the weight files of an earlier save, except those in `keep`."""
    names = {path.name for path in keep}
    for path in directory.iterdir():
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in names:
            path.unlink()
