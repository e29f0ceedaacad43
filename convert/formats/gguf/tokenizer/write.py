"""A tokenizer's files as GGUF metadata, the inverse of `convert.formats.gguf.tokenizer.read`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from convert.formats.gguf.tokenizer.pre_tokenizers import pre_tokenizer_name
from convert.formats.gguf.tokenizer.refusal import refusal
from convert.formats.gguf.tokenizer.sentencepiece import (
    open_sentencepiece,
    scores_of_merges,
    scores_of_pieces,
    sentencepiece_metadata,
)
from convert.formats.gguf.tokenizer.special_tokens import special_id_metadata, template_metadata
from convert.formats.gguf.tokenizer.vocabulary import bos_eos_metadata, pad_vocabulary
from llama_jax.config import LlamaConfig
from llama_jax.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from llama_jax.text.tokenizer import read_tokenizer
from llama_jax.text.tokenizer_files import json_file
from llama_jax.text.tokenizer_json import Json

Metadata = dict[str, Any]
Merges = list[tuple[str, str]]


def tokenizer_metadata(files: Mapping[str, bytes], config: LlamaConfig) -> Metadata:
    """Vocabulary, merges or scores, special ids and chat templates.

    Args:
        files: of the model's directory, by name.

    Raises:
        ValueError: a tokenizer that GGUF cannot express.
    """
    metadata = _vocabulary_metadata(files, config.vocab_size)
    ids = {token: i for i, token in enumerate(metadata.get("tokenizer.ggml.tokens", []))}
    metadata |= special_id_metadata(files, config, ids)
    if ids:
        metadata |= template_metadata(files)
    return metadata


def _vocabulary_metadata(files: Mapping[str, bytes], rows: int) -> Metadata:
    """All that turns text into ids, for an embedding of so many rows."""
    if "tokenizer.json" in files:
        return _tokenizer_json_metadata(files, rows)
    pieces = open_sentencepiece(files)
    if pieces is not None:
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            **sentencepiece_metadata(pieces, files, rows),
        }
    if unsupported := sorted(files.keys() & {"vocab.json", "merges.txt"}):
        raise refusal(f"found {unsupported[0]}, expected tokenizer.json or tokenizer.model")
    return {"tokenizer.ggml.model": "none"}  # llama.cpp's word for ids without text


def _tokenizer_json_metadata(files: Mapping[str, bytes], rows: int) -> Metadata:
    content = json_file(files, "tokenizer.json")
    model_type = content["model"]["type"]
    if model_type != "BPE":
        raise refusal(f"its model is {model_type}, expected BPE")
    tokenizer = read_tokenizer(files, as_written=True)
    tokens, types = _tokens(tokenizer, rows)
    decoder = content.get("decoder") or {}
    if decoder.get("type") == "ByteLevel":
        metadata = _byte_level_metadata(content, tokenizer, tokens, types)
    else:
        metadata = _sentencepiece_metadata(content, files, tokens, types)
    return metadata | bos_eos_metadata(tokenizer)


def _tokens(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row of the embedding."""
    added = tokenizer.get_added_tokens_decoder()

    def type_of(token_id: int) -> int:
        if token_id not in added:
            return NORMAL
        return CONTROL if added[token_id].special else USER_DEFINED

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    entries = {token_id: (token, type_of(token_id)) for token, token_id in vocabulary.items()}
    return pad_vocabulary(entries, rows)


def _merges(content: Json) -> Merges:
    """The pairs that are joined; older files have each as one string."""
    pairs = []
    for merge in content["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def _byte_level_metadata(
    content: Json, tokenizer: Tokenizer, tokens: list[str], types: list[int]
) -> Metadata:
    normalizer = content.get("normalizer")
    if normalizer is not None:
        kind = normalizer.get("type")
        raise refusal(f"its normalizer is {kind}, expected none before byte-level BPE")
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(
            tokenizer.pre_tokenizer, ignore_merges=bool(content["model"].get("ignore_merges"))
        ),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if merges := _merges(content):
        metadata["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    return metadata


def _sentencepiece_metadata(
    content: Json, files: Mapping[str, bytes], tokens: list[str], types: list[int]
) -> Metadata:
    unknown = content["model"].get("unk_token")
    types = _sentencepiece_types(tokens, types, unknown)
    pieces = open_sentencepiece(files)
    if pieces is None:
        scores = scores_of_merges(tokens, types, _merges(content))
    else:
        scores = scores_of_pieces(tokens, pieces)
    metadata: Metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": _adds_space_prefix(content),
    }
    if unknown in tokens:
        metadata["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
    return metadata


def _sentencepiece_types(
    tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> list[int]:
    """The types with those of the unknown token and of single bytes, of which llama.cpp needs all."""
    result = []
    for token, type_ in zip(tokens, types, strict=True):
        if token == unknown:
            result.append(UNKNOWN)
        elif type_ == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            result.append(BYTE)
        else:
            result.append(type_)
    if (count := result.count(BYTE)) != 256:
        raise refusal(f"it has {count} tokens of single bytes, expected 256: <0x00> to <0xFF>")
    return result


def _adds_space_prefix(content: Json) -> bool:
    """Whether a space is put in front of the text."""
    for step in [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]:
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _steps(part: Json | None) -> list[Json]:
    """The steps of a normalizer or pre-tokenizer, which is one step or a sequence of them."""
    if part is None:
        return []
    return part.get("normalizers") or part.get("pretokenizers") or [part]
