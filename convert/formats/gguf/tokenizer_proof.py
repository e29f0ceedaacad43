"""The proof that a tokenizer survives GGUF: read back from the metadata, it gives the same ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from convert.formats.gguf.sentencepiece import open_sentencepiece
from convert.formats.gguf.special_tokens import refusal
from convert.formats.gguf.tokenizer_read import tokenizer_files
from llama_jax.config import LlamaConfig
from llama_jax.text.tokenizer import read_tokenizer

_TRIALS = [
    *("", "a", " ", "  ", " a", "   a", "a   ", "Hello, world!", "\n", "\n\n a\t\tb\r\n \r\n"),
    *("don't I'LL we've", "2024-01-02 3.14159 1,000,000 12345678", "x² ½ ٣٤ Ⅷ 五", "A1b2C3 x_y__z"),
    *(
        "éàü ñ ß İı ǅ e\u0301 क्षि",
        "中文测试 日本語 한국어",
        "العربية עברית ไทย",
        "🙂👨\u200d👩🏳️\u200d🌈",
    ),
    *(
        "\u200b\u00a0 nbsp\u2003em \u2028",
        "https://x.y/z?a=1&b=%20#",
        "!!!???...///",
        "▁ visible ▁▁",
    ),
    *("def f(x):\n    return x ** 2  # squared\n\n\n\tend", "\x00\x01\x7f", "a" * 50, "\U0010ffff"),
]


def require_same_ids(
    files: Mapping[str, bytes], metadata: Mapping[str, Any], config: LlamaConfig
) -> None:
    """Raise ValueError where the tokenizer that `metadata` describes gives other ids than `files` do.

    A tokenizer.model of SentencePiece's is the original and tokenizer.json a rendering of it, which differs
    after special tokens and before leading spaces; where both are there, the original is compared with.
    """
    if metadata["tokenizer.ggml.model"] == "none":
        return
    fields = {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")]
    } | {"max_position_embeddings": config.max_position_embeddings}
    read, _, _ = tokenizer_files(Path("the tokenizer as GGUF"), dict(metadata), fields)
    found = Tokenizer.from_str(read["tokenizer.json"])
    added = [token.content for token in found.get_added_tokens_decoder().values()]
    pieces = open_sentencepiece(files) if metadata["tokenizer.ggml.model"] == "llama" else None
    if pieces is not None:
        expected = {text: pieces.encode(text) for text in _TRIALS}
    else:
        original = read_tokenizer(files, as_written=True)
        trials = _TRIALS + [f"a {token} b{token}{token}  c\n{token}" for token in added]
        expected = {text: original.encode(text).ids for text in trials}
    for text, ids in expected.items():
        other = found.encode(text, add_special_tokens=pieces is None).ids
        if other != ids:
            raise refusal(
                f"{text!r} would become {_few(other)}, expected {_few(ids)}"
                + ("" if pieces is not None else _HINTS[metadata["tokenizer.ggml.model"]])
            )


_HINTS = {
    "gpt2": "",
    "llama": " (with SentencePiece's tokenizer.model beside it, that is written)",
}


def _few(ids: list[int]) -> str:
    return str(ids[:10]) + (" and on" if len(ids) > 10 else "")
