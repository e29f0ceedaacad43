"""The tokenizer in a GGUF file's metadata, as the files Hugging Face's tokenizers are read from.

A GGUF keeps the vocabulary, the merges or scores, a type per token and the special ids, and names the
pre-tokenizer; what the name means is written in llama.cpp's `llama-vocab.cpp`. From that a whole
`tokenizer.json` follows: normaliser, splitting, model, post-processor and decoder are all spelled out,
so that every reader of the file tokenises alike.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf.ends import end_ids, ends_by_text
from llama_jax.text.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    sentencepiece_parts,
)
from llama_jax.text.tiktoken import SPLIT as LLAMA3_SPLIT
from llama_jax.text.tokenizer_json import Json, added_token, bpe, template, tokenizer_json


@dataclass(frozen=True)
class Pre:
    """What a `tokenizer.ggml.pre` stands for: how text is split before byte-level BPE."""

    splits: tuple[str, ...] = ()
    """Regular expressions, each isolating its matches in what the earlier ones left."""
    digits: bool = False
    """Every numeral by itself."""
    gpt2: bool = True
    """GPT-2's own regular expression last, as the ByteLevel pre-tokenizer has it built in."""
    ignore_merges: bool = False
    """A whole piece that is in the vocabulary is one token, merges or not."""
    add_bos: bool = False
    """What holds when `tokenizer.ggml.add_bos_token` is not given."""


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


def tokenizer_files(
    path: Path, metadata: Json, config: Json
) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """(files, facts, notes): text by relative path, what `info` shows, what the user should know.

    `config` gives the ids of bos, eos and pad. Raises ValueError for a kind of tokenizer or a
    pre-tokenizer not known here, and for vocabularies that contradict themselves.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return {}, {}, ["the file has no tokenizer"]
    if kind not in ("gpt2", "llama"):
        raise _error(path, f"tokenizer.ggml.model is {kind!r}, expected 'gpt2' or 'llama'")
    tokens, types = _vocabulary(path, metadata)
    for i in ends_by_text(tokens):
        types[i] = CONTROL  # as llama.cpp has it, whatever the file says
    ids = {
        "bos": config["bos_token_id"],
        "eos": config["eos_token_id"],
        "pad": config["pad_token_id"],
        "unk": metadata.get("tokenizer.ggml.unknown_token_id", 0 if kind == "llama" else None),
    }
    special = {
        f"{name}_token": tokens[i]
        for name, i in ids.items()
        if isinstance(i, int) and 0 <= i < len(tokens)
    }
    added = [
        added_token(i, token, special=type_ != USER_DEFINED or token in special.values())
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED) or token in special.values()
    ]

    notes: list[str] = []
    if kind == "gpt2":
        pre, add_bos = _pre_tokenizer(path, metadata, notes)
        parts = _byte_level(tokens, _merges(path, metadata, tokens), pre)
    else:
        add_bos = True
        parts = sentencepiece_parts(
            tokens,
            types,
            _scores(path, metadata, tokens),
            unknown=special.get("unk_token"),
            prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        )
    add = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in special,
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special,
    }
    before, after = ([special[f"{n}_token"]] if add[n] else [] for n in ("bos", "eos"))
    ids_of = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizer_json(
        added_tokens=added, post_processor=template(before, after, ids_of), **parts
    )
    tokenizer_config: Json = {
        # The class that takes tokenizer.json as it is: transformers' LlamaTokenizer and GPT2Tokenizer
        # rebuild the splitting they know and drop the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    files = {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n"}
    files |= _chat_templates(path, metadata, tokenizer_config)
    files["tokenizer_config.json"] = (
        json.dumps(tokenizer_config, ensure_ascii=False, indent=2) + "\n"
    )
    facts = {"model": kind, "pre": metadata.get("tokenizer.ggml.pre"), "tokens": len(tokens)}
    facts |= special | {"chat_template": "chat_template" in tokenizer_config}
    return files, {"tokenizer": facts}, notes


def generation_config(metadata: Json, config: Json) -> Json:
    """`generation_config.json`: where to stop, and the sampling the file recommends, if it does.

    A chat model ends its turn with another token than its text (Llama 3: <|eot_id|>, <|eom_id|>), so
    the eos here is a list where llama.cpp would end at several.
    """
    ends = [config["eos_token_id"], *end_ids(metadata)]
    known = dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < config["vocab_size"])
    result: Json = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": list(known) if len(known) > 1 else next(iter(known), None),
        "pad_token_id": config["pad_token_id"],
    }
    for key, name in [
        ("temp", "temperature"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("penalty_repeat", "repetition_penalty"),
    ]:
        value = metadata.get(f"general.sampling.{key}")
        off = name in ("top_k", "min_p") and value == 0
        if isinstance(value, np.float32) and np.isfinite(value) and (value > 0 or off):
            result[name] = float(str(value))
        elif type(value) is int and (value > 0 or off):
            result[name] = value
    result["do_sample"] = "temperature" in result
    return {name: value for name, value in result.items() if value is not None}


def _error(path: Path, message: str) -> ValueError:
    return ValueError(f"{path}: {message}; --no-tokenizer converts the weights alone")


def _vocabulary(path: Path, metadata: Json) -> tuple[list[str], list[int]]:
    """Tokens and their types, one each."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise _error(path, "tokenizer.ggml.tokens is not an array of strings")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            raise _error(path, f"tokens {first[token]} and {i} are both {token!r}")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise _error(path, f"tokenizer.ggml.token_type does not have {len(tokens)} entries")
    if not all(type(each) is int for each in types):
        raise _error(path, "tokenizer.ggml.token_type is not an array of integers")
    return tokens, list(types)


# --- byte-level BPE ----------------------------------------------------------------------------------


def _pre_tokenizer(path: Path, metadata: Json, notes: list[str]) -> tuple[Pre, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name == "default":
        notes.append("the file does not say how it splits text before BPE: taken to be GPT-2's way")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise _error(
            path,
            f"tokenizer.ggml.pre is {name!r}, expected one of {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return PRE_TOKENIZERS[name], PRE_TOKENIZERS[name].add_bos


def _merges(path: Path, metadata: Json, tokens: list[str]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise _error(path, "tokenizer.ggml.merges is not an array of strings")
    known = set(tokens)
    pairs = []
    for i, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # a piece may itself be a space, as the first character
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= known:
            raise _error(path, f"merge {i}, {merge!r}, has parts or a result that are not tokens")
        pairs.append((left, right))
    return pairs


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def splitting(pre: Pre) -> Json:
    """What `pre` stands for as the `pre_tokenizer` of a tokenizer.json."""
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in pre.splits
    ]
    if pre.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    steps.append({**_BYTE_LEVEL, "use_regex": pre.gpt2})
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], pre: Pre) -> Json:
    return {
        "normalizer": None,
        "pre_tokenizer": splitting(pre),
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": bpe(
            {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre.ignore_merges
        ),
    }


# --- SentencePiece BPE -------------------------------------------------------------------------------


def _scores(path: Path, metadata: Json, tokens: list[str]) -> list[float]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise _error(path, f"tokenizer.ggml.scores does not have {len(tokens)} entries")
    return scores


# --- around the model --------------------------------------------------------------------------------


def _chat_templates(path: Path, metadata: Json, tokenizer_config: Json) -> dict[str, str]:
    """The default template goes into tokenizer_config.json (transformers 4) and beside it (5)."""
    files: dict[str, str] = {}
    for key, text in metadata.items():
        name = key.removeprefix("tokenizer.chat_template")
        if name == key or not isinstance(text, str):
            continue
        if not name:
            tokenizer_config["chat_template"] = text
            files["chat_template.jinja"] = text
        elif re.fullmatch(r"\.[A-Za-z0-9_-]{1,64}", name):
            files[f"additional_chat_templates/{name[1:]}.jinja"] = text
        else:
            raise _error(path, f"{key!r} is not a name for a chat template")
    return files
