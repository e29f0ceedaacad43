"""The tokenizer in a GGUF file's metadata, as the files that Hugging Face's tokenizers are read from.

A GGUF keeps the vocabulary, the merges or scores, a type per token and the special ids, and names the
pre-tokenizer (see `convert.formats.gguf.tokenizer.pre_tokenizers`). From that a complete `tokenizer.json`
follows: normalizer, splitting, model, post-processor and decoder are all spelled out, so that every reader
of the file tokenizes alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from convert.formats.gguf.tokenizer.ends import ends_by_text
from convert.formats.gguf.tokenizer.pre_tokenizers import (
    BYTE_LEVEL,
    PRE_TOKENIZERS,
    Pre,
    pre_tokenizer_json,
)
from llama_jax.text.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    sentencepiece_parts,
)
from llama_jax.text.tokenizer_json import Json, added_token, bpe, template, tokenizer_json

Metadata = Mapping[str, Any]


class TokenizerFiles(NamedTuple):
    """A tokenizer out of GGUF metadata."""

    files: dict[str, str]
    """Text by relative path: tokenizer.json, tokenizer_config.json, chat templates."""
    facts: dict[str, Any]
    """What `info` shows."""
    notes: list[str]
    """What the user should know."""


def tokenizer_files(metadata: Metadata, config: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer that `metadata` describes.

    Args:
        config: has the ids of bos, eos and pad, and max_position_embeddings.

    Raises:
        ValueError: a kind of tokenizer or pre-tokenizer not known here, or a vocabulary that contradicts
            itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return TokenizerFiles({}, {}, ["the file has no tokenizer"])
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, expected 'gpt2' or 'llama'")
    tokens, types = _vocabulary(metadata)
    for i in ends_by_text(tokens):
        types[i] = CONTROL  # as llama.cpp has it, whatever the file says
    named = _named_tokens(metadata, config, tokens)
    notes: list[str] = []
    if kind == "gpt2":
        pre = _pre(metadata, notes)
        parts, add_bos = _byte_level(tokens, _merges(metadata, tokens), pre), pre.add_bos
    else:
        parts, add_bos = _sentencepiece(metadata, tokens, types, named.get("unk_token")), True
    before = _around("bos", metadata, named, default=add_bos)
    after = _around("eos", metadata, named, default=False)
    content = tokenizer_json(
        added_tokens=_added_tokens(tokens, types, set(named.values())),
        post_processor=template(before, after, {token: i for i, token in enumerate(tokens)}),
        **parts,
    )
    settings: Json = {
        # The class that takes tokenizer.json as it is: transformers' LlamaTokenizer and GPT2Tokenizer
        # rebuild the splitting they know and drop the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    templates = _chat_templates(metadata)
    if (default := templates.get("chat_template.jinja")) is not None:
        settings["chat_template"] = default  # transformers 4 reads it here, 5 in its file
    files = {
        "tokenizer.json": _json_text(content),
        **templates,
        "tokenizer_config.json": _json_text(settings),
    }
    facts = {
        "model": kind,
        "pre": metadata.get("tokenizer.ggml.pre"),
        "tokens": len(tokens),
        **named,
        "chat_template": "chat_template" in settings,
    }
    return TokenizerFiles(files, {"tokenizer": facts}, notes)


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[int]]:
    """Tokens and their types, one each."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ValueError("tokenizer.ggml.tokens is not an array of strings")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            raise ValueError(f"tokens {first[token]} and {i} are both {token!r}")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type does not have {len(tokens)} entries")
    if not all(type(entry) is int for entry in types):
        raise ValueError("tokenizer.ggml.token_type is not an array of integers")
    return tokens, list(types)


def _named_tokens(
    metadata: Metadata, config: Mapping[str, Any], tokens: list[str]
) -> dict[str, str]:
    """The special tokens that there are, by transformers' name: bos_token, eos_token, ..."""
    default_unknown = 0 if metadata["tokenizer.ggml.model"] == "llama" else None
    ids = {
        "bos_token": config["bos_token_id"],
        "eos_token": config["eos_token_id"],
        "pad_token": config["pad_token_id"],
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id", default_unknown),
    }
    return {
        name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)
    }


def _added_tokens(tokens: list[str], types: list[int], named: set[str]) -> list[Json]:
    """The tokens that are matched whole in the text."""
    return [
        added_token(i, token, special=type_ != USER_DEFINED or token in named)
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED) or token in named
    ]


def _around(name: str, metadata: Metadata, named: Mapping[str, str], *, default: bool) -> list[str]:
    """The token bos or eos where it is put before or after each text, else nothing."""
    adds = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    token = named.get(f"{name}_token")
    return [token] if adds and token is not None else []


# --- byte-level BPE ----------------------------------------------------------------------------------


def _pre(metadata: Metadata, notes: list[str]) -> Pre:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name == "default":
        notes.append("the file does not say how it splits text before BPE: assuming GPT-2's way")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, expected one of {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _merges(metadata: Metadata, tokens: list[str]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise ValueError("tokenizer.ggml.merges is not an array of strings")
    known = set(tokens)
    pairs = []
    for i, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # a piece may itself be a space, as the first character
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= known:
            raise ValueError(f"merge {i}, {merge!r}, has parts or a result that are not tokens")
        pairs.append((left, right))
    return pairs


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], pre: Pre) -> Json:
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_json(pre),
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": bpe(
            {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre.ignore_merges
        ),
    }


# --- SentencePiece BPE -------------------------------------------------------------------------------


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[int], unknown: str | None
) -> Json:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores does not have {len(tokens)} entries")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return sentencepiece_parts(tokens, types, scores, unknown=unknown, prefix=prefix)


# --- around the model --------------------------------------------------------------------------------


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    """The templates by their files in a directory of transformers 5."""
    files: dict[str, str] = {}
    for key, text in metadata.items():
        name = key.removeprefix("tokenizer.chat_template")
        if name == key or not isinstance(text, str):
            continue
        if not name:
            files["chat_template.jinja"] = text
        elif re.fullmatch(r"\.[A-Za-z0-9_-]{1,64}", name):
            files[f"additional_chat_templates/{name[1:]}.jinja"] = text
        else:
            raise ValueError(f"{key!r} is not a name for a chat template")
    return files


def _json_text(content: Json) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
