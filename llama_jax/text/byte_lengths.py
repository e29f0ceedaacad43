"""How many bytes of text each token of a tokenizer stands for, as bits per byte need it."""

import json
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.text.incremental import special_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def byte_lengths(tokenizer: "Tokenizer") -> np.ndarray:
    """Bytes of UTF-8 that each id adds to a text: [ids] int64, 0 for special tokens and unused ids.

    Exact for byte-level tokenizers, also where a token is a part of a character, and for those of
    SentencePiece, whose `▁` is a space. Of any other, what the token adds to the decoded text of the token
    before it.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> tokenizer = Tokenizer(models.BPE({"a": 0, "Ġa": 1, "Ã": 2}, []))
    >>> tokenizer.decoder = decoders.ByteLevel()
    >>> byte_lengths(tokenizer)
    array([1, 2, 1])
    """
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(1 + max(vocab.values(), default=-1), np.int64)
    special = special_pieces(tokenizer)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = "" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()
    kinds = _types(json.loads(decoder)) if decoder else set()
    for piece, token in vocab.items():
        if piece in special:
            continue
        if piece in added:
            lengths[token] = len(piece.encode())
        elif "ByteLevel" in kinds:
            lengths[token] = len(piece)  # a character for each byte
        elif "ByteFallback" in kinds and _is_byte(piece):
            lengths[token] = 1
        elif kinds & {"Metaspace", "Replace"}:
            lengths[token] = len(piece.replace("▁", " ").encode())
        else:
            alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
            lengths[token] = len(twice.encode()) - len(alone.encode())
    return lengths


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _types(node: object) -> set[str]:
    """The types of a decoder and of those in it."""
    if isinstance(node, list):
        return {kind for element in node for kind in _types(element)}
    if not isinstance(node, dict):
        return set()
    own = {node["type"]} if isinstance(node.get("type"), str) else set()
    return own.union(*(_types(value) for value in node.values()))
