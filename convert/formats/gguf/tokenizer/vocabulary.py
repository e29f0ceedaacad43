"""Tokens and their types, one for each row of the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from convert.formats.gguf.tokenizer.refusal import refusal
from llama_jax.text.sentencepiece import UNUSED


def pad_vocabulary(
    entries: Mapping[int, tuple[str, int]], rows: int
) -> tuple[list[str], list[int]]:
    """The tokens and types of all ids below `rows`; ids without a token are padding.

    Args:
        entries: a token and its type by id.

    Raises:
        ValueError: an id that is no row.
    """
    if (largest := max(entries, default=0)) >= rows:
        raise refusal(f"it has ids up to {largest}, expected less than vocab_size {rows}")
    # named as llama.cpp's converter names them
    padded = [entries.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    return [token for token, _ in padded], [type_ for _, type_ in padded]


def bos_eos_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Whether a tokenizer puts special tokens around a text.

    Whether these are bos and eos is checked in `convert.formats.gguf.tokenizer.same_ids`.
    """
    is_special = tokenizer.encode("a").special_tokens_mask
    return {
        "tokenizer.ggml.add_bos_token": is_special[0] == 1,
        "tokenizer.ggml.add_eos_token": is_special[-1] == 1,
    }
