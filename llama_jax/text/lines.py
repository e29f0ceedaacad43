r"""Text files and their lines, the same for every command: UTF-8, lines that end with \n, \r\n or \r.

As in Python's text mode, and unlike `str.splitlines`, form feeds, U+0085, U+2028 and the like do not end
a line. A byte order mark at the beginning is not part of the text.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "\ufeff"  # the byte order mark
# UTF-32 first: its little-endian mark begins with that of UTF-16
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path) -> str:
    """The text of a file with its line ends unchanged.

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
    """The lines of a text without their ends; text after the last line end is a line too."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def byte_lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    r"""The lines of a UTF-8 binary file without their ends; iterating over one only splits at \n."""
    for piece in stream:
        yield from piece.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def not_utf8(where: str, error: UnicodeDecodeError) -> str:
    """The error message for text that is not UTF-8; a byte order mark names its encoding.

    Args:
        where: a file, or a line in one.
    """
    for mark, name in _OTHER_ENCODINGS:
        # decoding fails at the mark itself, except for leading zeros
        if error.start <= 2 and error.object.startswith(mark):
            return f"{where}: found {name}, expected UTF-8: iconv -f {name} -t UTF-8 converts it"
    return f"{where}: found the byte 0x{error.object[error.start]:02x}, expected UTF-8"
