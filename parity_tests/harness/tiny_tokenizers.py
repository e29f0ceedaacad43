"""Tiny tokenizers in both of Meta's formats, and strings that tokenizers get wrong."""

from __future__ import annotations

import base64
import io
from functools import cache
from itertools import pairwise
from typing import Any

import regex
import sentencepiece
import tiktoken

from llama_jax.text.tiktoken import SPLIT, special_tokens

CORPUS = [
    "The quick brown fox doesn't jump over 1234 lazy dogs; they're 56 years old, I'll bet.",
    "In 2024, the 3rd x² test cost $1,000.50 (or 900 €)! What? Yes... no-one's sure.",
    "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(12))\r\n\t\tend",
    "Größe, naïveté, Ελλάδα, Москва, 東京都 2020年, 서울, العربية ١٢٣, हिन्दी",
    "the then there these other another mother father weather whether together",
    "banana ananas aaaa aaaaaa abab ababab baba abcabc mississippi 111222111",
] * 4

HARD = [
    "", "a", " ", "  ", "   x", "x   ", "Hello, world!", "\n", "\n\n\nfoo\t\tbar\r\n \r\n", "a\n b",
    "don't I'LL we've THEY'RE o'clock 's", "2024-01-02 3.14159 1,000,000", " 7 8  9 word123word 4x",
    "x² ½ ٣٤ Ⅷ 五 ੩", "éàü ñ ß İı ǅ", "中文测试 日本語 한국어", "🙂👨‍👩‍👧‍👦🏳️‍🌈", "a\u0301 e\u0308 क्षि",
    "\u200b\ufeff\u00a0 nbsp\u2003em \u2028", "<s>x</s><unk> <s> a", "<0x41><0x0A>", "[INST] hi [/INST]",
    "<|begin_of_text|>x<|eot_id|> <|end_of_text|>", "<|reserved_special_token_3|><|python_tag|>",
    "https://x.y/z?a=1&b=%20#", "\x00\x01\x7f", "العربية עברית ไทย", "a" * 100, " " * 30 + "b",
    "\ud7ff\ue000\uffff\U0010ffff", "▁ visible ▁▁", "the▁the", "!!!???...", "A1b2C3",
    "abababaaababba" * 3, "\u4e00\u4e8c3\u4e09", "'S 'D'Ll '\u017f \u017f's",
]  # fmt: skip


@cache
def sentencepiece_model(**options: Any) -> bytes:
    """A tokenizer.model in the format of Llama 1 and 2: BPE with byte fallback and split digits."""
    out = io.BytesIO()
    fields = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, **(fields | options)
    )
    return out.getvalue()


@cache
def tiktoken_ranks(count: int = 480) -> dict[bytes, int]:
    """Tokens and ranks of a byte-pair encoding trained on CORPUS."""
    ranks = {bytes([i]): i for i in range(256)}
    words = [
        [bytes([b]) for b in piece.encode()] for t in CORPUS for piece in regex.findall(SPLIT, t)
    ]
    while len(ranks) < count:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


def tiktoken_model(count: int = 480) -> bytes:
    """A tokenizer.model in the format of Llama 3."""
    lines = (base64.b64encode(t) + b" %d\n" % rank for t, rank in tiktoken_ranks(count).items())
    return b"".join(lines)


@cache
def tiktoken_encoding(count: int = 480, *, release_3_0: bool = False) -> tiktoken.Encoding:
    """The same as a tiktoken encoding, with Meta's pattern and special tokens."""
    ranks = tiktoken_ranks(count)
    specials = special_tokens(release_3_0=release_3_0)
    return tiktoken.Encoding(
        name="tiny",
        pat_str=SPLIT,
        mergeable_ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(specials)},
    )
