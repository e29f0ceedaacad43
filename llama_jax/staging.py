"""Directories that are either whole or not there: written beside their name, moved when complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_jax.safetensors_write import remove_stale


@contextmanager
def staged_directory(directory: Path, *, into_existing: bool) -> Iterator[Path]:
    """A temporary sibling of `directory` that takes its name when the block ends without an error.

    Args:
        into_existing: whether `directory` may exist; then the new files replace those of the same name
            and the weights of an earlier save, and its other files are left alone.

    Raises:
        FileExistsError: `directory` is there and must not be, or is no directory.
    """
    directory = directory.absolute()  # '.' has no name of its own
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    staging.mkdir()
    try:
        yield staging
        if not os.path.lexists(directory):
            staging.rename(directory)
        elif into_existing and directory.is_dir():
            written = [directory / path.name for path in staging.iterdir()]
            for path in written:
                os.replace(staging / path.name, path)
            remove_stale(directory, keep=written)
        else:
            # rename would silently replace an empty directory
            raise FileExistsError(f"{directory}: has appeared meanwhile, expected it to be absent")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as it is, and see it to the disk."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
