"""The proof that a tokenizer survives GGUF: read back from the metadata, it gives the same ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from convert.formats.gguf.tokenizer.read import tokenizer_files
from convert.formats.gguf.tokenizer.refusal import refusal
from convert.formats.gguf.tokenizer.sentencepiece import open_sentencepiece
from llama_jax.config import LlamaConfig
from llama_jax.text.tokenizer import read_tokenizer

_TEXTS = [
    *("", "a", " ", "  ", " a", "   a", "a   ", "Hello, world!", "\n", "\n\n a\t\tb\r\n \r\n"),
    *("don't I'LL we've", "2024-01-02 3.14159 1,000,000 12345678", "x² ½ ٣٤ Ⅷ 五", "A1b2C3 x_y__z"),
    *("éàü ñ ß İı ǅ e\u0301 क्षि", "中文测试 日本語 한국어", "العربية עברית ไทย"),
    *("🙂👨\u200d👩🏳️\u200d🌈", "\u200b\u00a0 nbsp\u2003em \u2028", "https://x.y/z?a=1&b=%20#"),
    *("!!!???...///", "▁ visible ▁▁", "def f(x):\n    return x ** 2  # squared\n\n\n\tend"),
    *("\x00\x01\x7f", "a" * 50, "\U0010ffff"),
]


def require_same_ids(
    files: Mapping[str, bytes], metadata: Mapping[str, Any], config: LlamaConfig
) -> None:
    """Raise ValueError where the tokenizer that `metadata` describes gives other ids than `files` do.

    A tokenizer.model of SentencePiece's is the original and tokenizer.json a rendering of it, which differs
    after special tokens and before leading spaces; where both are present, the original decides.
    """
    model = metadata["tokenizer.ggml.model"]
    if model == "none":
        return
    converted = _read_back(metadata, config)
    pieces = open_sentencepiece(files) if model == "llama" else None
    if pieces is not None:
        expected = {text: pieces.encode(text) for text in _TEXTS}
        hint = ""
    else:
        original = read_tokenizer(files, as_written=True)
        added = [token.content for token in converted.get_added_tokens_decoder().values()]
        around_added = [f"a {token} b{token}{token}  c\n{token}" for token in added]
        expected = {text: original.encode(text).ids for text in [*_TEXTS, *around_added]}
        hint = " (put SentencePiece's tokenizer.model beside it to use that)"
        hint = hint if model == "llama" else ""
    for text, expected_ids in expected.items():
        ids = converted.encode(text, add_special_tokens=pieces is None).ids
        if ids != expected_ids:
            raise refusal(
                f"{text!r} would become {_shortened(ids)}, expected {_shortened(expected_ids)}{hint}"
            )


def _read_back(metadata: Mapping[str, Any], config: LlamaConfig) -> Tokenizer:
    """The tokenizer that a conversion from `metadata` would give."""
    fields = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "max_position_embeddings": config.max_position_embeddings,
    }
    try:
        files = tokenizer_files(metadata, fields).files
    except ValueError as error:
        raise refusal(f"read back, {error}") from None
    return Tokenizer.from_str(files["tokenizer.json"])


def _shortened(ids: list[int]) -> str:
    return f"{ids[:10]}{'...' if len(ids) > 10 else ''}"
