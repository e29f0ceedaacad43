"""A tokenizer's files as GGUF metadata, the inverse of `convert.formats.gguf.tokenizer_read`."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from convert.formats.gguf.sentencepiece import (
    open_sentencepiece,
    scores_of_merges,
    scores_of_pieces,
    sentencepiece_metadata,
)
from convert.formats.gguf.special_tokens import (
    Json,
    refusal,
    sampling,
    special_ids,
    template_metadata,
)
from convert.formats.gguf.tokenizer_read import PRE_TOKENIZERS, Pre, splitting
from llama_jax.config import LlamaConfig
from llama_jax.text.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from llama_jax.text.tokenizer import read_tokenizer
from llama_jax.text.tokenizer_files import json_file


def tokenizer_metadata(files: Mapping[str, bytes], config: LlamaConfig) -> dict[str, Any]:
    """Vocabulary, merges or scores, special ids, templates and sampling.

    Ids without a token are padding, as in llama.cpp's converter. Raises ValueError for a tokenizer that
    GGUF cannot express.
    """
    vocabulary = _vocabulary(files, config.vocab_size)
    ids = {token: i for i, token in enumerate(vocabulary.get("tokenizer.ggml.tokens", []))}
    return {
        **vocabulary,
        **special_ids(files, config, ids),
        **(template_metadata(files) if ids else {}),
        **sampling(files),
    }


def _vocabulary(files: Mapping[str, bytes], rows: int) -> dict[str, Any]:
    """What turns text into ids, for an embedding of so many rows."""
    if "tokenizer.json" not in files:
        if (pieces := open_sentencepiece(files)) is not None:
            return {**_SENTENCEPIECE, **sentencepiece_metadata(pieces, files, rows)}
        if other := sorted(files.keys() & {"vocab.json", "merges.txt"}):
            raise refusal(f"found {other[0]}, expected tokenizer.json or tokenizer.model")
        return {"tokenizer.ggml.model": "none"}  # llama.cpp's word for ids without text
    content = json_file(files, "tokenizer.json")
    model = content["model"]
    if model["type"] != "BPE":
        raise refusal(f"its model is {model['type']}, expected BPE")
    tokenizer = read_tokenizer(files, as_written=True)
    tokens, types = _tokens(tokenizer, rows)
    merges = [
        (left, right)
        for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    ]
    around = tokenizer.encode("a").special_tokens_mask
    common = {
        "tokenizer.ggml.tokens": tokens,
        # which tokens they are, the proof looks at
        "tokenizer.ggml.add_bos_token": around[0] == 1,
        "tokenizer.ggml.add_eos_token": around[-1] == 1,
    }
    if (content.get("decoder") or {}).get("type") == "ByteLevel":
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_tokenizer(content, tokenizer),
            **common,
            "tokenizer.ggml.token_type": types,
            **({"tokenizer.ggml.merges": [" ".join(m) for m in merges]} if merges else {}),
        }
    unknown = model.get("unk_token")
    types = _sentencepiece_types(tokens, types, unknown)
    pieces = open_sentencepiece(files)
    return {
        **_SENTENCEPIECE,
        **common,
        "tokenizer.ggml.scores": scores_of_merges(tokens, types, merges)
        if pieces is None
        else scores_of_pieces(tokens, pieces),
        "tokenizer.ggml.token_type": types,
        **({"tokenizer.ggml.unknown_token_id": tokens.index(unknown)} if unknown in tokens else {}),
        "tokenizer.ggml.add_space_prefix": _space_prefix(content),
    }


_SENTENCEPIECE = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}


def _tokens(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row of the embedding."""
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(by_id, default=0) >= rows:
        raise refusal(f"it has ids up to {max(by_id)}, expected less than vocab_size {rows}")
    added = tokenizer.get_added_tokens_decoder()

    def type_(i: int) -> int:
        if i not in by_id:
            return UNUSED
        if i in added:
            return CONTROL if added[i].special else USER_DEFINED
        return NORMAL

    return [by_id.get(i, f"[PAD{i}]") for i in range(rows)], [type_(i) for i in range(rows)]


# --- byte-level BPE ----------------------------------------------------------------------------------

# One of each kind that splitting tells apart; every string of up to three of them is tried.
_KINDS = [
    "a",
    "A",
    "é",
    "1",
    "²",
    " ",
    "\n",
    "\r",
    "\t",
    "'",
    ".",
    "/",
    "中",
    "\u0301",
    "ǅ",
    "🙂",
    "s",
]
TRIALS = [
    *map("".join, itertools.chain(*(itertools.product(_KINDS, repeat=n) for n in (1, 2, 3)))),
    *("123 1234 12345 ٣٤٥٦ ⅧⅧ", "don't I'LL we'Ve they're 'tis o'clock I'm you'd x's"),
    *("   a", "a   ", "a  \n  b", "...//\n/ a", "\u00a0 \u3000x"),
    *("!!!\n\nab", "a_b__c", "https://x.y/z?a=1&b=%20#", "日本語 한국어 가나"),
]  # fmt: skip


def _pre_tokenizer(content: Json, tokenizer: Tokenizer) -> str:
    """The name of the splitting: the first that cuts every trial alike."""
    if content.get("normalizer") is not None:
        found = content["normalizer"].get("type")
        raise refusal(f"its normalizer is {found}, expected none before byte-level BPE")

    def cut(splitter: PreTokenizer | None, trial: str) -> list[str]:
        return [] if splitter is None else [piece for piece, _ in splitter.pre_tokenize_str(trial)]

    expected = [cut(tokenizer.pre_tokenizer, trial) for trial in TRIALS]
    names: dict[Pre, str] = {}
    for name, pre in PRE_TOKENIZERS.items():
        if name != "default":  # llama.cpp warns of it
            names.setdefault(pre, name)
    for pre, name in names.items():
        splitter = splitter_of(pre)
        if pre.ignore_merges == bool(content["model"].get("ignore_merges")) and all(
            cut(splitter, trial) == pieces for trial, pieces in zip(TRIALS, expected, strict=True)
        ):
            return name
    raise refusal(
        "it splits text in a way that GGUF has no name for, expected that of one of "
        f"{', '.join(names.values())}"
    )


def splitter_of(pre: Pre) -> PreTokenizer:
    """What cuts text as `pre` says; the pieces are in byte-level BPE's alphabet."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    content = {"model": empty, "pre_tokenizer": splitting(pre)}
    return Tokenizer.from_str(json.dumps(content)).pre_tokenizer


# --- SentencePiece -----------------------------------------------------------------------------------


def _sentencepiece_types(
    tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> list[int]:
    """With the tokens of single bytes, of which llama.cpp wants all, and the unknown one."""
    found = [
        UNKNOWN
        if token == unknown
        else BYTE
        if type_ == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token)
        else type_
        for token, type_ in zip(tokens, types, strict=True)
    ]
    if (count := found.count(BYTE)) != 256:
        raise refusal(f"it has {count} tokens of single bytes, expected 256: <0x00> to <0xFF>")
    return found


def _space_prefix(content: Json) -> bool:
    """Whether a space is put in front of the text."""

    def steps(part: Json | None) -> list[Json]:
        part = part or {}
        return part.get("normalizers") or part.get("pretokenizers") or [part]

    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps(content.get("normalizer")) + steps(content.get("pre_tokenizer"))
    )
