"""What `tokenizer.ggml.pre` names: how text is split before byte-level BPE.

GGUF names the splitting and llama.cpp's `llama-vocab.cpp` says what each name means; a tokenizer.json
spells it out. Here is the table of names, and the search for the name of a splitting.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from convert.formats.gguf.tokenizer.refusal import refusal
from llama_jax.text.tiktoken import SPLIT as LLAMA3_SPLIT
from llama_jax.text.tokenizer_json import Json


@dataclass(frozen=True)
class Pre:
    """What a `tokenizer.ggml.pre` stands for."""

    splits: tuple[str, ...] = ()
    """Regular expressions, each isolating its matches in what the earlier ones left."""
    digits: bool = False
    """Every numeral by itself."""
    gpt2: bool = True
    """GPT-2's own regular expression last, as the ByteLevel pre-tokenizer has it built in."""
    ignore_merges: bool = False
    """A whole piece that is in the vocabulary is one token, merges or not."""
    add_bos: bool = False
    """What `tokenizer.ggml.add_bos_token` is where it is missing."""


_QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER_SPLITS = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)

_GPT2 = Pre()
_DIGITS = Pre(digits=True)
_LLAMA3 = Pre(splits=(LLAMA3_SPLIT,), gpt2=False, ignore_merges=True, add_bos=True)
_LLAMA3_PLAIN = Pre(splits=(LLAMA3_SPLIT,), gpt2=False)
_QWEN2 = Pre(splits=(_QWEN2_SPLIT,), gpt2=False)

PRE_TOKENIZERS: dict[str, Pre] = {
    **dict.fromkeys(["default", "gpt-2", "phi-2", "mpt", "olmo", "trillion", "mellum"], _GPT2),
    **dict.fromkeys(
        ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], _DIGITS
    ),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"], _LLAMA3),
    **dict.fromkeys(["dbrx", "smaug-bpe"], _LLAMA3_PLAIN),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"], _QWEN2),
    "tekken": Pre(splits=(_TEKKEN_SPLIT,), gpt2=False, ignore_merges=True, add_bos=True),
    "deepseek-coder": Pre(splits=_DEEPSEEK_CODER_SPLITS, digits=True, gpt2=False),
}

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def pre_tokenizer_json(pre: Pre) -> Json:
    """What `pre` stands for as the `pre_tokenizer` of a tokenizer.json."""
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in pre.splits
    ]
    if pre.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    steps.append({**BYTE_LEVEL, "use_regex": pre.gpt2})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def pre_tokenizer_of(pre: Pre) -> PreTokenizer:
    """What splits text as `pre` says; the pieces are in byte-level BPE's alphabet."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    content = {"model": empty, "pre_tokenizer": pre_tokenizer_json(pre)}
    return Tokenizer.from_str(json.dumps(content)).pre_tokenizer


# One of each kind that splitting tells apart; every string of up to three of them is tried.
_CHARACTERS = [*"aAé1²", " ", "\n", "\r", "\t", *"'./中", "\u0301", *"ǅ🙂s"]
TRIALS = [
    *map("".join, itertools.chain(*(itertools.product(_CHARACTERS, repeat=n) for n in (1, 2, 3)))),
    *("123 1234 12345 ٣٤٥٦ ⅧⅧ", "don't I'LL we'Ve they're 'tis o'clock I'm you'd x's"),
    *("   a", "a   ", "a  \n  b", "...//\n/ a", "\u00a0 \u3000x"),
    *("!!!\n\nab", "a_b__c", "https://x.y/z?a=1&b=%20#", "日本語 한국어 가나"),
]


def pre_tokenizer_name(pre_tokenizer: PreTokenizer | None, *, ignore_merges: bool) -> str:
    """The name of a splitting: the first in the table that splits every trial alike.

    Args:
        pre_tokenizer: None does not split at all.
        ignore_merges: of the tokenizer's model; the names stand for that as well.

    Raises:
        ValueError: GGUF has no name for it.
    """
    expected = [_pieces(pre_tokenizer, trial) for trial in TRIALS]
    names: dict[Pre, str] = {}
    for name, pre in PRE_TOKENIZERS.items():
        if name != "default":  # llama.cpp warns about it
            names.setdefault(pre, name)
    for pre, name in names.items():
        if pre.ignore_merges != ignore_merges:
            continue
        candidate = pre_tokenizer_of(pre)
        if all(
            _pieces(candidate, trial) == pieces
            for trial, pieces in zip(TRIALS, expected, strict=True)
        ):
            return name
    raise refusal(
        "it splits text in a way that GGUF has no name for, expected that of one of "
        f"{', '.join(names.values())}"
    )


def _pieces(pre_tokenizer: PreTokenizer | None, text: str) -> list[str]:
    if pre_tokenizer is None:
        return []
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
