"""Formatting for people: sizes, errors, and a console that prints strings literally."""

import re
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def first_line(error: Exception, limit: int = 200) -> str:
    """The first line of another library's error, or the error's class name if it has no text.

    >>> first_line(ValueError("bad magic\\nat byte 0")), first_line(KeyError())
    ('bad magic', 'KeyError')
    """
    text = str(error)
    return text.splitlines()[0][:limit] if text else type(error).__name__


def size(text: str | int) -> int:
    """Bytes from "5GB", "2GiB", "500M" or a bare number. Raises ValueError.

    >>> size("1.5KB"), size("2GiB")
    (1500, 2147483648)
    """
    match = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B?)", str(text).strip(), re.IGNORECASE
    )
    if match:
        prefix = (match[2] or "").upper()
        nbytes = int(float(match[1]) * (_BINARY if match[3] else _DECIMAL)[prefix])
        if nbytes > 0:
            return nbytes
    raise ValueError(f"found {text!r}, expected a size such as 500MB, 5GB or 2GiB")


def summarize(title: str, problems: list[str], limit: int = 20) -> str:
    """A title and a list of problems as one line; of more than `limit`, the number of the others.

    >>> summarize("model.safetensors", ["a: missing", "b: missing", "c: missing"], limit=2)
    'model.safetensors: a: missing; b: missing; and 1 more'
    """
    shown = "; ".join(problems[:limit])
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{title}: {shown}{more}"


_MIN_WIDTH = 20  # columns

# Unicode categories of control characters, surrogates and line separators
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    """`text` with control characters, line ends and lone surrogates escaped as in Python literals."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROL else c
        for c in text
    )


def console(*, stderr: bool = False, **options: Any) -> "Console":
    """A rich console that prints strings literally: no markup, no emoji codes, no highlighting.

    To style text, use a `rich.text.Text` or print with `style=`.

    Args:
        stderr: for messages that are not part of the output.
        options: further options of `rich.console.Console`.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            lines = (printable(line) for line in text.split("\n"))
            return super().render_str("\n".join(lines), **options)

        def on_broken_pipe(self) -> None:
            if threading.current_thread() is threading.main_thread():
                raise  # rich would raise SystemExit
            self.quiet = True  # a thread that redraws has no caller to raise to

    literal: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    plain = Plain(stderr=stderr, **(literal | options))
    if plain.width < _MIN_WIDTH:  # a terminal of unknown width; rich would leave out columns
        plain.width = 80
    return plain


@contextmanager
def progress_bar(*columns: Any, console: "Console") -> Iterator["Progress"]:
    """A rich progress display that is erased after an error, so that only the error is shown."""
    from rich.progress import Progress

    progress = Progress(*columns, console=console)
    progress.start()
    try:
        yield progress
    except BaseException:
        progress.live.transient = True
        progress.live.stop()  # `progress.stop` would print an empty line where nothing is redrawn
        raise
    progress.stop()
