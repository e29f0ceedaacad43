"""Directories written beside what they replace and moved into place when complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_jax.safetensors_write import remove_stale


@contextmanager
def staged_directory(directory: Path, *, into_existing: bool) -> Iterator[Path]:
    """A temporary directory whose files become `directory` when the block ends without an error.

    A new `directory` appears whole, by one rename, or not at all. Into an existing one the files are
    moved one by one, config.json last, when all of them are written.

    Args:
        into_existing: whether `directory` may exist; then the new files replace those of the same name
            and the weights of an earlier save, and its other files are left alone.

    Raises:
        FileExistsError: `directory` is there and must not be, or is no directory.
    """
    directory = directory.absolute()  # '.' has no name of its own
    if into_existing and directory.is_dir():
        # inside it: a mount point or a link may lie on another disk than its parent
        staging = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=directory))
        made: list[Path] = []
    else:
        made = _make_parents(directory)
        prefix = f".{directory.name}."
        staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=directory.parent))
    try:
        yield staging
        if staging.parent == directory:
            names = sorted(os.listdir(staging), key=lambda name: name == "config.json")
            for name in names:
                os.replace(staging / name, directory / name)
            remove_stale(directory, keep=[directory / name for name in names])
        elif os.path.lexists(directory):
            # rename would silently replace an empty directory
            raise FileExistsError(f"{directory}: exists, expected it to be absent")
        else:
            staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            parent.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as it is, and see it to the disk."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make_parents(directory: Path) -> list[Path]:
    """Make the missing parents; returns them, the innermost first."""
    missing = [parent for parent in directory.parents if not parent.exists()]
    directory.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
