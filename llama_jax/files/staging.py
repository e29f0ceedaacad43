"""Files and directories written beside what they replace and moved into place when complete."""

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

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, the error of a full disk names `path`: a `write` does not say of which file it is.

    What is written beside its place is called by the name that it would have had.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def staging_in(parent: Path, name: str) -> Iterator[Path]:
    """An empty directory in `parent` for what will become `name`; what is left in it goes at the end.

    It is locked while it is used, so that what a killed process has left behind is known and removed.
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

    A new `directory` appears whole, by one rename, or not at all. Into an existing one the files are
    moved one by one, config.json last. Either happens when all of them are on the disk.

    Args:
        into_existing: whether `directory` may exist; then the new files replace those of the same name
            and the weights of an earlier save, and its other files are left alone.
        stale: names of other files of an earlier save, which go where no new one takes their place.

    Raises:
        FileExistsError: `directory` is there and must not be, or is no directory.
    """
    directory = directory.absolute()  # '.' has no name of its own
    if into_existing and directory.is_dir():
        # inside it: a mount point or a link may lie on another disk than its parent
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
    made = _make_parents(directory)
    try:
        with staging_in(directory.parent, directory.name) as staging:
            yield staging
            to_disk(staging)
            staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            move(staging, directory)
    except BaseException:
        for parent in made:
            parent.rmdir()
        raise


def move(staged: Path, final: Path) -> None:
    """Rename what is complete. Raises FileExistsError where something has come to be there."""
    if os.path.lexists(final):
        # rename would silently replace a file or an empty directory
        raise FileExistsError(f"{final}: exists, expected it to be absent")
    staged.rename(final)


def to_disk(path: Path) -> None:
    """Wait until a file, or every file and directory below one, is on the disk."""
    for each in (*path.rglob("*"), path) if path.is_dir() else (path,):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as it is, and see it to the disk."""
    path.parent.mkdir(exist_ok=True)
    with writing(path), path.open("w", encoding="utf-8", newline="") as file:
        try:
            file.write(text)
            file.flush()
            if path.is_file():  # no device and no pipe, which have nothing to wait for
                os.fsync(file.fileno())
        except OSError:
            if path.is_file():
                path.unlink()  # half a file is worse than none
            raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for what becomes `path` when the block ends, and goes where it fails.

    Where `path` is a link, the file it names is replaced. A device or a pipe is written as it is:
    putting a file in its place would take it from everybody else.
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
        if error.filename in (staged, str(staged)):  # a name that the user did not choose
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        with suppress(OSError):
            staged.unlink()


def _lock(directory: Path) -> int | None:
    """An open, locked descriptor, or None where another process holds the lock."""
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
    """Make the missing parents; returns them, the innermost first."""
    missing = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def remove_stale(directory: Path, keep: Iterable[Path]) -> None:
    """Remove the weight files of an earlier save, except those in `keep`."""
    names = {path.name for path in keep}
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in names:
            path.unlink()
