"""Token ids to text as they come: never half a character, and up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HALF = "\ufffd"  # how a decoder shows bytes that are no character yet
_CONTEXT = 8  # tokens before the new ones: whether a space goes between is known only with them


class TextStream:
    """The text of tokens that come one by one. `stopped` once one of `stops` has come, which is left out.

    Text that may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stops: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.stopped = False
        self.ids = list(prompt[-_CONTEXT:])
        self.read = len(self.ids)  # the text of ids[:read] is out, or held back
        self.held = ""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.ids.append(token)
        return self._emit(self._new_text(), final=False)

    def finish(self) -> str:
        """The rest, half characters as U+FFFD."""
        return self._emit(self._new_text(final=True), final=True)

    def _new_text(self, final: bool = False) -> str:
        known = self.tokenizer.decode(self.ids[: self.read])
        text = self.tokenizer.decode(self.ids)
        if text.endswith(_HALF) and not final:
            return ""
        self.ids = self.ids[-_CONTEXT:] if len(self.ids) > 2 * _CONTEXT else self.ids
        self.read = len(self.ids)
        return text[len(known) :]

    def _emit(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
