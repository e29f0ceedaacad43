"""Token ids to text as they come: never half a character, and up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llama_jax.text.incremental import IncrementalDecoder, common_length, special_pieces
from llama_jax.text.tiktoken import bytes_shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextStream:
    """The text of tokens that come one by one, as decoding prompt and tokens at once gives it.

    `stopped` once one of `stops` has come, which is left out with all that follows. Special tokens are not
    in the text, but a stop string may name them, alone or among other text. Text that may be the
    beginning of a stop string is held back until it is known.

    Args:
        tokenizer: of any kind.
        prompt: the tokens before the first one; stop strings in them do not count.
        stops: none of them empty.

    Raises:
        ValueError: an empty stop string.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stops: Sequence[str] = ()):
        if "" in stops:
            raise ValueError("stops: found an empty text, expected at least one character")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._prompt, self._new = list(prompt), list[int]()
        self._shown = IncrementalDecoder(tokenizer, prompt)
        self._out = 0  # characters given out
        self._held = ""  # text that comes next, unless a stop string begins in it
        # the text with its special tokens, as far as a stop string may begin in it
        self._special = special_pieces(tokenizer) if stops else frozenset()
        self._all = (
            IncrementalDecoder(tokenizer, prompt, skip_special_tokens=False)
            if self._special
            else None
        )
        self._pieces: list[_Piece] = []
        self._shown_before = 0

    def push(self, token: int) -> str:
        """The text that is certain now."""
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
        """The rest, half characters as U+FFFD.

        Args:
            end: the token that ended the text. It adds none, but a stop string may name it.
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
        """Keep what the newest token added to the text with special tokens."""
        if not text:
            return
        count, special = len(self._new), self._tokenizer.id_to_token(self._new[-1])
        if special in self._special:
            # a decoder may have made its marks of spaces into spaces
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
        """Whether a stop string is complete if no more byte pieces follow; a line end may be one."""
        if self.stopped or not self._stops:
            return False
        texts = [self._held + self._shown.undecided()]
        if self._all is not None:
            texts.append("".join(piece.text for piece in self._pieces) + self._all.undecided())
        return any("\ufffd" not in text and self._places(text) for text in texts)

    def _emit(self, final: bool) -> str:
        """What of the held text can go out."""
        text, start = self._held, self._out
        ends = [(place, text) for place in self._places(text)]
        whole = "".join(piece.text for piece in self._pieces)
        if places := self._places(whole):
            before = self._text_until(min(places))
            ends += [(place, before) for place in (len(before), *self._places(before))]
        if ends:
            self.stopped, self._held, self._pieces = True, "", []
            end, text = min(ends)
            return text[:end]
        safe = start + len(text)
        if not final:
            safe -= self._overlap(text)
            sure = len(whole) - self._overlap(whole)
            while self._pieces and len(self._pieces[0].text) <= sure:
                sure -= len(self._pieces.pop(0).text)
            if self._pieces:
                safe = max(start, min(safe, self._pieces[0].shown_before))
        self._out, self._held = safe, text[safe - start :]
        return text[: safe - start]

    def _text_until(self, place: int) -> str:
        """The text to come that stands before this place in the kept pieces."""
        for piece in self._pieces:
            if place < len(piece.text):
                break
            place -= len(piece.text)
        text = continuation_text(self._tokenizer, self._prompt, self._new[: piece.tokens])
        after = "" if piece.special else piece.text[place:]
        for special in self._special:
            after = after.replace(special, "")
        # both texts end alike, whatever spaces they begin with
        return text[self._out : max(self._out, len(text) - len(after))]

    def _places(self, text: str) -> list[int]:
        return [place for stop in self._stops if (place := text.find(stop)) >= 0]

    def _overlap(self, text: str) -> int:
        """How many characters at the end of `text` may begin a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


class _Piece(NamedTuple):
    """Text with special tokens. tokens: how many were new at its end; special: it is one of them.

    shown_before: characters of the text without special tokens that come before it for certain.
    """

    text: str
    tokens: int
    special: bool
    shown_before: int


def continuation_text(tokenizer: "Tokenizer", prompt: Sequence[int], new: Sequence[int]) -> str:
    """What `new` adds to the text of `prompt`, both decoded at once; without special tokens."""
    before, whole = tokenizer.decode([*prompt]), tokenizer.decode([*prompt, *new])
    return whole[common_length(before, whole) :]


def token_texts(tokenizer: "Tokenizer", ids: Sequence[int]) -> list[str]:
    """The text of each token as it is within a text: with the space before a word, special tokens too.

    A token of half a character is shown by its bytes: `<0xE2>`.
    """
    texts = []
    for token in ids:
        text = tokenizer.decode([token], skip_special_tokens=False)
        if tokenizer.decoder is not None:
            # decoders take a space away at the beginning of a text, which is not where this stands
            text = tokenizer.decode([token, token], skip_special_tokens=False)[len(text) :]
        piece = tokenizer.id_to_token(token) or ""
        texts.append(bytes_shown(piece) if "\ufffd" in text and "\ufffd" not in piece else text)
    return texts


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
