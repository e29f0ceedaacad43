r"""What a text file and its lines are, for every command: UTF-8, lines that end with \n, \r\n or \r.

As Python's own text files have it. Form feeds, U+0085, U+2028 and the like are characters within a line,
unlike in `str.splitlines`. A byte order mark at the beginning is no part of the text.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "\ufeff"  # the byte order mark
# the longer first: that of UTF-32 in little-endian order begins with that of UTF-16
_OTHERS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(str(path), error)) from None


def read_lines(path: Path) -> list[str]:
    """The lines of a file without their ends. Raises as `read_text`."""
    return split_lines(read_text(path))


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends; what follows the last end is a line if there is any."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def byte_lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    r"""The lines of UTF-8 without their ends, out of what a binary file yields: pieces that end with \n."""
    for piece in stream:
        yield from piece.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def not_utf8(where: str, error: UnicodeDecodeError) -> str:
    """The line that says so of a file, or of a line in it; it names the encoding that a mark tells."""
    for mark, name in _OTHERS:
        # the mark itself is what cannot be decoded, but for the zeros it may begin with
        if error.start <= 2 and error.object.startswith(mark):
            return f"{where}: found {name}, expected UTF-8: iconv -f {name} -t UTF-8 converts it"
    return f"{where}: found the byte 0x{error.object[error.start]:02x}, expected UTF-8"
