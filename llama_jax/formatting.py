"""Text for people: sizes, errors, reports, and a console that shows strings as they are."""

import re
import threading
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def first_line(error: Exception, limit: int = 200) -> str:
    """What another library's error says, for a line of ours; the error's name where it says nothing."""
    text = str(error)
    return text.splitlines()[0][:limit] if text else type(error).__name__


def size(text: str | int) -> int:
    """Bytes from "5GB", "2GiB", "500M" or a bare number. Raises ValueError."""
    match = re.fullmatch(
        r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B?)", str(text).strip(), re.IGNORECASE
    )
    if match:
        prefix = (match[2] or "").upper()
        found = int(float(match[1]) * (_BINARY if match[3] else _DECIMAL)[prefix])
        if found > 0:
            return found
    raise ValueError(f"found {text!r}, expected a size such as 500MB, 5GB or 2GiB")


def report(title: str, faults: list[str], limit: int = 20) -> str:
    """All faults as one line, the first `limit` of them in full."""
    shown = "; ".join(faults[:limit])
    more = f"; and {len(faults) - limit} more" if len(faults) > limit else ""
    return f"{title}: {shown}{more}"


_NARROWEST = 20  # columns of a terminal

_CONTROL = {
    "Cc",
    "Cs",
    "Zl",
    "Zp",
}  # Unicode's categories of what moves the cursor or is no character


def printable(text: str) -> str:
    """`text` with control characters, line ends and lone surrogates escaped as in Python's literals."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROL else c
        for c in text
    )


def console(*, stderr: bool = False, **options: Any) -> "Console":
    """A rich console that shows every string as it is: no markup, no emoji codes, no highlighting.

    What is to be styled is a `rich.text.Text`, or printed with `style=`.

    Args:
        stderr: for what is said beside the output.
        options: more of `rich.console.Console`'s.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            lines = (printable(line) for line in text.split("\n"))
            return super().render_str("\n".join(lines), **options)

        def on_broken_pipe(self) -> None:
            if threading.current_thread() is threading.main_thread():
                raise  # rich's own answer is SystemExit
            self.quiet = True  # a thread that redraws has nobody to raise to

    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    made = Plain(stderr=stderr, **(plain | options))
    if (
        made.width < _NARROWEST
    ):  # a terminal that does not know, where whole columns would be left out
        made.width = 80
    return made
