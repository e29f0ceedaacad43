"""Text to the token ids that a model is asked about: nothing cut off, filled up or appended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class EncodedText(NamedTuple):
    """before: the special tokens that the tokenizer puts before `ids`, those of the text itself."""

    before: list[int]
    ids: list[int]


def encode_text(tokenizer: "Tokenizer", text: str) -> EncodedText:
    """The tokens of a text that may go on.

    What the tokenizer appends (an end of text) is left out: it would be scored, and end what goes on. What
    it puts before (a beginning of text) is left out where the text begins with it anyway, as
    lm-evaluation-harness does. Truncation and padding that the tokenizer has been told are ignored.
    """
    with _whole_texts(tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        around = tokenizer.encode(text)
    # without a token of the text, what goes before it and what goes after cannot be told apart
    before = around.ids[: around.special_tokens_mask.index(0)] if ids else []
    return EncodedText([] if ids[: len(before)] == before else before, ids)


@contextmanager
def _whole_texts(tokenizer: "Tokenizer") -> Iterator[None]:
    """The tokenizer without truncation and padding, which it has again afterwards."""
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
