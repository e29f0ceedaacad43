"""The formats that are read in place."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from train.data.formats import array_record, arrow, megatron, token_bin
from train.data.tokens import Tokens, Vocabulary
from train.options import TokenOptions


class Format(Protocol):
    """A module that reads token files."""

    def find_files(self, path: Path) -> list[Path]:
        """The files of this format at a path, which may be a file, a directory, a prefix or a glob."""

    def companions(self, file: Path) -> list[Path]:
        """Files that belong to one that `find_files` found, itself first."""

    def open_files(
        self, files: Sequence[Path], vocabulary: Vocabulary, options: TokenOptions
    ) -> Tokens:
        """Memory-map the files as one sequence. Raises ValueError if one is damaged."""


# by name; the first that finds files reads them
FORMATS: dict[str, Format] = {
    "Megatron": megatron,
    "Arrow": arrow,
    "ArrayRecord": array_record,
    "bin": token_bin,
}


class Found(NamedTuple):
    """Files and the name of their format."""

    format: str
    files: list[Path]


def find_format(path: Path) -> Found | None:
    """The files at a path and their format; None if they are of no known one."""
    for name, module in FORMATS.items():
        if files := module.find_files(path):
            return Found(name, files)
    return None
