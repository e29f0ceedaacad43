"""tyro's errors on one line: it draws a box of what is wrong, advice and help."""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import TypeVar

T = TypeVar("T")

_WIDE = "10000"  # columns in which nothing is broken into lines


def parse_flags(parse: Callable[[], T]) -> T:
    """What `parse` returns, a call of tyro's. Raises ValueError for flags that it refuses."""
    try:
        with redirect_stderr(io.StringIO()):
            return parse()
    except SystemExit as end:
        if not end.code:  # --help
            raise
    # once more, for a box of which all lines are whole, drawn as where stdout has UTF-8
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    utf8 = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    os.environ["COLUMNS"] = _WIDE
    try:
        with redirect_stderr(said), redirect_stdout(utf8):
            return parse()
    except SystemExit:
        raise ValueError(f"{_message(said.getvalue())}; see --help") from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _message(box: str) -> str:
    """The sentence of a box: what stands above its first rule, without the help of single flags."""
    sentence = []
    for line in box.splitlines():
        inner = line.strip().removeprefix("│").removesuffix("│").removeprefix(" ").rstrip()
        if inner.startswith(("╭", "╰")):
            continue
        if inner.startswith("─"):
            break
        if not inner.startswith(" " * 8):
            sentence.append(inner.strip())
    return " ".join(sentence).removesuffix(".")
