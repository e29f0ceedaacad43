"""Text to the token ids that are scored: not truncated, padded or ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class EncodedText(NamedTuple):
    """Token ids of a text.

    Attributes:
        before: special tokens that the tokenizer puts before a text.
        ids: tokens of the text itself.
    """

    before: list[int]
    ids: list[int]


def encode_text(tokenizer: "Tokenizer", text: str) -> EncodedText:
    """Encode a text without an end-of-text token.

    That token would be scored, and nothing could follow it. The beginning-of-text token is left out if
    the text already begins with it, as in lm-evaluation-harness. Truncation and padding that are set on
    the tokenizer are ignored.
    """
    with _full_length(tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        full = tokenizer.encode(text)
    # for an empty text, tokens before and after it could not be told apart
    before = full.ids[: full.special_tokens_mask.index(0)] if ids else []
    return EncodedText([] if ids[: len(before)] == before else before, ids)


@contextmanager
def _full_length(tokenizer: "Tokenizer") -> Iterator[None]:
    """Within, the tokenizer neither truncates nor pads."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)
