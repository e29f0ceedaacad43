"""Decode token ids one at a time, with the same text as decoding them all at once."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
# these join all tokens into one text; decoders after them see text across tokens
_JOINING = {"ByteLevel", "Fuse"}
# these decode tokens one by one, except the first, the last, and runs of byte pieces
_PER_TOKEN = {"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "Replace", "Strip", "WordPiece"}
_MAX_PARTIAL = 3  # bytes of an incomplete UTF-8 character
_MAX_WINDOW = 64  # tokens; after so many without text, more change nothing


class IncrementalDecoder:
    """The text of generated tokens that follow a prompt.

    The returned parts add up to the text of prompt and tokens decoded together, without the prefix that it
    shares with the prompt decoded alone. A part is returned once no later token can change it: bytes of an
    incomplete character wait, and so does a run of byte pieces (`<0xE2>`), all of which `tokenizers` turns
    into U+FFFD if any character in the run is invalid. Only a short window of tokens is decoded again.

    Args:
        tokenizer: a `tokenizers.Tokenizer` of any kind.
        prompt: tokens before the first generated one.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: "Tokenizer", prompt: Sequence[int], *, skip_special_tokens: bool = True
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = special_pieces(tokenizer) if skip_special_tokens else frozenset()
        kinds = _decoder_kinds(tokenizer)
        self._all_at_once = kinds is None
        self._byte_level = kinds is not None and "ByteLevel" in kinds
        self._byte_fallback = kinds is not None and "ByteFallback" in kinds
        self._window = self._tail([token for token in prompt if self._piece(token) is not None])
        self._known = self._decode(self._window)  # the part of the window's text returned already

    def push(self, token: int) -> str:
        """Take a token; return the text that no later token can change."""
        piece = self._piece(token)
        if piece is None:
            return ""
        self._window.append(token)
        if self._all_at_once or (self._byte_fallback and _is_byte(piece)):
            return ""
        text = self._decode(self._window)
        certain = self._certain(text)
        if len(certain) < len(self._known) and certain != text:
            return ""  # the prompt ends inside a character
        new = self._beyond_known(certain)
        self._window = self._tail(self._window)
        self._known = self._decode(self._window)
        if certain != text:
            self._known = self._certain(self._known)
        return new

    def undecided(self) -> str:
        """What `finish` would return for a run of byte pieces; "" if the run is long."""
        if not self._byte_fallback or len(self._window) > _MAX_WINDOW:
            return ""
        return self._beyond_known(self._decode(self._window))

    def finish(self) -> str:
        """Return the remaining text. No token may be pushed afterwards."""
        return self._beyond_known(self._decode(self._window))

    def _beyond_known(self, text: str) -> str:
        return text[common_length(text, self._known) :]

    def _certain(self, text: str) -> str:
        """`text` without a possible beginning of a character."""
        return text.removesuffix(_REPLACEMENT) if self._byte_level else text

    def _tail(self, ids: list[int]) -> list[int]:
        """The shortest tail of `ids` after which later tokens decode as they do after `ids`.

        It holds the tokens that are still undecided, and before them enough for some text, because decoders
        treat the first token and leading spaces differently.
        """
        if self._all_at_once:
            return ids
        closed = len(ids)
        while closed and self._byte_fallback and _is_byte(self._piece(ids[closed - 1]) or ""):
            closed -= 1
        if self._byte_level:
            closed = min(closed, max(0, len(ids) - _MAX_PARTIAL))
        count = 1
        while count < min(closed, _MAX_WINDOW) and not self._decode(ids[closed - count : closed]):
            count = min(2 * count, closed)
        return ids[max(0, closed - count) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _piece(self, token: int) -> str | None:
        """The token's entry in the vocabulary; None if decoding skips it."""
        piece = self._tokenizer.id_to_token(token)
        return None if piece in self._skipped else piece


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def special_pieces(tokenizer: "Tokenizer") -> frozenset[str]:
    """Special tokens, which decoding skips by default."""
    added = tokenizer.get_added_tokens_decoder().values()
    return frozenset(token.content for token in added if token.special)


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _decoder_kinds(tokenizer: "Tokenizer") -> set[str] | None:
    """The types of the decoders in sequence; None if a later token may change all of the text."""
    decoder = tokenizer.decoder
    if decoder is None:
        return set()
    try:
        steps = list(_steps(json.loads(decoder.__getstate__())))
    except Exception:  # a bare one of `tokenizers`: a decoder written in Python has no JSON
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
