"""Token ids to text while they are generated: never half a character, and up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llama_jax.text.incremental import IncrementalDecoder, common_length, special_pieces
from llama_jax.text.tiktoken import show_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextStream:
    """The text of generated tokens, one at a time; together the same as decoding them all at once.

    The text ends before the first of `stops`; then `stopped` is true. Special tokens are not part of the
    text, but a stop string may contain them. Text that may be the beginning of a stop string is held back
    until that is decided.

    Args:
        tokenizer: a `tokenizers.Tokenizer` of any kind.
        prompt: tokens before the first generated one; stop strings in them do not count.
        stops: stop strings, not empty.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stops: Sequence[str] = ()):
        if "" in stops:
            raise ValueError("stops: a stop string is empty; leave it out")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._prompt, self._new = list(prompt), list[int]()
        self._shown = IncrementalDecoder(tokenizer, prompt)
        self._out = 0  # characters returned so far
        self._held = ""  # decoded but not returned: a stop string may begin in it
        # the text with special tokens, as far back as a stop string may begin
        self._special = special_pieces(tokenizer) if stops else frozenset()
        self._all = (
            IncrementalDecoder(tokenizer, prompt, skip_special_tokens=False)
            if self._special
            else None
        )
        self._pieces: list[_Piece] = []
        self._shown_before = 0

    def push(self, token: int) -> str:
        """Take a token; return the text that no later token can change."""
        if self.stopped:
            return ""
        self._new.append(token)
        before = self._out + len(self._held)
        self._held += self._shown.push(token)
        if self._all is not None:
            self._add_piece(self._all.push(token), before)
        text = self._emit(final=False)
        return text + self._rest() if self._ends_undecided() else text

    def finish(self, end: int | None = None) -> str:
        """Return the remaining text; an incomplete character becomes U+FFFD.

        Args:
            end: the token that ended generation. It adds no text, but a stop string may contain it.
        """
        text = ""
        if end is not None and self._tokenizer.id_to_token(end) in self._special:
            text = self.push(end)
        return text + self._rest()

    def _rest(self) -> str:
        if self.stopped:
            return ""
        before = self._out + len(self._held)
        self._held += self._shown.finish()
        if self._all is not None:
            self._add_piece(self._all.finish(), before)
        return self._emit(final=True)

    def _add_piece(self, text: str, before: int) -> None:
        """Store what the latest token added to the text with special tokens."""
        if not text:
            return
        count, special = len(self._new), self._tokenizer.id_to_token(self._new[-1])
        if special in self._special:
            # a decoder may have turned its space marks into spaces
            shown = next((s for s in (special, special.replace("▁", " ")) if text.endswith(s)), "")
            if shown:
                text = text.removesuffix(shown)
                if text:
                    self._pieces.append(_Piece(text, count - 1, False, self._shown_before))
                self._pieces.append(_Piece(special, count, True, before))
                self._shown_before = self._out + len(self._held)
                return
        self._pieces.append(_Piece(text, count, False, self._shown_before))
        self._shown_before = self._out + len(self._held)

    def _ends_undecided(self) -> bool:
        """Whether a stop string is complete unless more byte pieces follow; a newline may be one."""
        if self.stopped or not self._stops:
            return False
        texts = [self._held + self._shown.undecided()]
        if self._all is not None:
            texts.append("".join(piece.text for piece in self._pieces) + self._all.undecided())
        return any("\ufffd" not in text and self._find_stops(text) for text in texts)

    def _emit(self, final: bool) -> str:
        """The part of the held text that can be returned."""
        text, start = self._held, self._out
        ends = [(position, text) for position in self._find_stops(text)]
        with_special = "".join(piece.text for piece in self._pieces)
        if positions := self._find_stops(with_special):
            before = self._text_until(min(positions))
            ends += [(end, before) for end in (len(before), *self._find_stops(before))]
        if ends:
            self.stopped, self._held, self._pieces = True, "", []
            end, text = min(ends)
            return text[:end]
        safe = start + len(text)
        if not final:
            safe -= self._overlap(text)
            decided = len(with_special) - self._overlap(with_special)
            while self._pieces and len(self._pieces[0].text) <= decided:
                decided -= len(self._pieces.pop(0).text)
            if self._pieces:
                safe = max(start, min(safe, self._pieces[0].shown_before))
        self._out, self._held = safe, text[safe - start :]
        return text[: safe - start]

    def _text_until(self, position: int) -> str:
        """The text not returned yet that comes before this position in the stored pieces."""
        for piece in self._pieces:
            if position < len(piece.text):
                break
            position -= len(piece.text)
        text = continuation_text(self._tokenizer, self._prompt, self._new[: piece.tokens])
        after = "" if piece.special else piece.text[position:]
        for special in self._special:
            after = after.replace(special, "")
        # the two texts may differ in leading spaces, but not at the end
        return text[self._out : max(self._out, len(text) - len(after))]

    def _find_stops(self, text: str) -> list[int]:
        return [position for stop in self._stops if (position := text.find(stop)) >= 0]

    def _overlap(self, text: str) -> int:
        """How many characters at the end of `text` may begin a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


class _Piece(NamedTuple):
    """A piece of the text with special tokens.

    Attributes:
        tokens: number of generated tokens up to its end.
        special: whether it is a special token.
        shown_before: how many characters of the text without special tokens certainly precede it.
    """

    text: str
    tokens: int
    special: bool
    shown_before: int


def continuation_text(tokenizer: "Tokenizer", prompt: Sequence[int], new: Sequence[int]) -> str:
    """What `new` adds to the text of `prompt` when both are decoded together; without special tokens."""
    before, text = tokenizer.decode([*prompt]), tokenizer.decode([*prompt, *new])
    return text[common_length(before, text) :]


def token_texts(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str]:
    """Each token as it appears inside a text, with the space before a word; special tokens included.

    A token that is part of a character is shown as bytes: `<0xE2>`.
    """
    texts = []
    for token in ids:
        text = tokenizer.decode([token], skip_special_tokens=False)
        if tokenizer.decoder is not None:
            # decoders strip a space at the beginning of a text, so decode the token after another one
            text = tokenizer.decode([token, token], skip_special_tokens=False)[len(text) :]
        piece = tokenizer.id_to_token(token) or ""
        texts.append(show_bytes(piece) if "\ufffd" in text and "\ufffd" not in piece else text)
    return texts


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
