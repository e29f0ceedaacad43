"""Decode token ids one at a time into exactly the text that decoding all of them at once gives."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
# these join all tokens into one text; a decoder behind them sees text across tokens
_JOINING = {"ByteLevel", "Fuse"}
# decoders of single tokens, but for the first and the last of all, and runs of byte pieces
_PER_TOKEN = {"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece"}
_LONGEST_PART = 3  # bytes of a UTF-8 character that is not complete
_MOST = 64  # tokens without any text, after which more of them change nothing


class IncrementalDecoder:
    """The text of tokens that come one by one after a prompt.

    The parts together are the text of prompt and tokens decoded at once, without what it has in common
    with the prompt decoded alone. A part is given out only when no later token can change it: bytes of an
    incomplete character wait, and so does a run of byte pieces (`<0xE2>`), which `tokenizers` shows as
    U+FFFD throughout if any character in it is damaged. Only a short window of tokens is decoded again.

    Args:
        tokenizer: of any kind.
        prompt: the tokens before the first one.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: "Tokenizer", prompt: Sequence[int], *, skip_special_tokens: bool = True
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = special_pieces(tokenizer) if skip_special_tokens else frozenset()
        kinds = _decoder_kinds(tokenizer)
        self._only_whole = kinds is None
        self._byte_level = kinds is not None and "ByteLevel" in kinds
        self._byte_fallback = kinds is not None and "ByteFallback" in kinds
        self._window = self._tail([token for token in prompt if self._piece(token) is not None])
        self._known = self._decode(self._window)  # what is out already of the window's text

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        piece = self._piece(token)
        if piece is None:
            return ""
        self._window.append(token)
        if self._only_whole or (self._byte_fallback and _is_byte(piece)):
            return ""
        text = self._decode(self._window)
        certain = self._certain(text)
        if len(certain) < len(self._known) and certain != text:
            return ""  # the prompt itself ends within a character
        new = self._beyond_known(certain)
        self._window = self._tail(self._window)
        self._known = self._decode(self._window)
        if certain != text:
            self._known = self._certain(self._known)
        return new

    def undecided(self) -> str:
        """What `finish` would give now of a run of byte pieces; nothing where the run is long."""
        if not self._byte_fallback or len(self._window) > _MOST:
            return ""
        return self._beyond_known(self._decode(self._window))

    def finish(self) -> str:
        """The rest, as it is when nothing follows. Nothing may be pushed afterwards."""
        return self._beyond_known(self._decode(self._window))

    def _beyond_known(self, text: str) -> str:
        return text[common_length(text, self._known) :]

    def _certain(self, text: str) -> str:
        """`text` without what may be the beginning of a character."""
        return text.removesuffix(_REPLACEMENT) if self._byte_level else text

    def _tail(self, ids: list[int]) -> list[int]:
        """As few of the last tokens as show all that follows in the same way as `ids` do.

        That is what is not decided yet, and before it enough for a text: decoders treat the first token,
        or spaces at the beginning, in another way.
        """
        if self._only_whole:
            return ids
        closed = len(ids)
        while closed and self._byte_fallback and _is_byte(self._piece(ids[closed - 1]) or ""):
            closed -= 1
        if self._byte_level:
            closed = min(closed, max(0, len(ids) - _LONGEST_PART))
        count = 1
        while count < min(closed, _MOST) and not self._decode(ids[closed - count : closed]):
            count = min(2 * count, closed)
        return ids[max(0, closed - count) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _piece(self, token: int) -> str | None:
        """The token's entry in the vocabulary; None if decoding passes it over."""
        piece = self._tokenizer.id_to_token(token)
        return None if piece in self._skipped else piece


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def special_pieces(tokenizer: "Tokenizer") -> frozenset[str]:
    """The special tokens, which decoding leaves out unless told otherwise."""
    added = tokenizer.get_added_tokens_decoder().values()
    return frozenset(token.content for token in added if token.special)


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _decoder_kinds(tokenizer: "Tokenizer") -> set[str] | None:
    """The kinds of decoders that run one after another; None if a later token may change any text."""
    decoder = tokenizer.decoder
    if decoder is None:
        return set()
    try:
        steps = list(_steps(json.loads(decoder.__getstate__())))
    except Exception:  # bare, from the library: a decoder written in Python has no JSON
        return None
    joined = False
    for kind in steps:
        if kind not in _PER_TOKEN | _JOINING or (joined and kind not in {"Fuse", "Strip"}):
            return None
        joined = joined or kind in _JOINING
    return set(steps)


def _steps(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] != "Sequence":
        return [decoder["type"]]
    return [kind for step in decoder["decoders"] for kind in _steps(step)]
