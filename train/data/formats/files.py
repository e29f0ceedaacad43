"""The files of a source, and which split their names say that they are of."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from train.data.tokens import Split

_NAMES: dict[str, Split | None] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    "test": None,
}


def list_files(path: Path, pattern: str) -> list[Path]:
    """The sorted files whose names match: the file itself, those in a directory, those of a glob.

    A directory is searched recursively, without hidden files.
    """
    if path.is_dir():
        files = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
    elif path.exists():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
    return sorted(file for file in files if re.search(pattern, file.name) and file.is_file())


def by_split(files: Sequence[Path]) -> dict[Split, list[Path]]:
    """Files by split, as their names say, or their folders' below the one that has them all.

    Names with the word "val", "valid", "validation", "dev" or "eval" are of the validation split, those
    with "test" of neither, and all others of the training split. So is a file that is alone.
    """
    splits: dict[Split, list[Path]] = {"train": [], "validation": []}
    if len(files) == 1:
        splits["train"] = [*files]
        return splits
    common = os.path.commonpath([file.parent for file in files])
    for file in files:
        if (split := split_of(file.relative_to(common))) is not None:
            splits[split].append(file)
    return splits


def split_of(path: Path) -> Split | None:
    """From the name, and then from the folders, the innermost first."""
    for part in reversed(path.parts):
        for word in re.findall("[a-z]+", part.lower()):
            if word in _NAMES:
                return _NAMES[word]
    return "train"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
