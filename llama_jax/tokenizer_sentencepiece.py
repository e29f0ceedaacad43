"""SentencePiece's `tokenizer.model` of the byte-pair kind, which Llama 1 and 2 have.

The file is a protobuf message `ModelProto` (google/sentencepiece, `sentencepiece_model.proto`). Of it
count the pieces with their scores and types, and a few options. SentencePiece joins the two neighbours
whose union scores highest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llama_jax.tokenizer_json import Json, added_token, bpe, template, tokenizer_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # the visible one
_BPE = 2  # trainer_spec.model_type


class Pieces(NamedTuple):
    """What a file holds: one of each for every id, and the ids of bos and eos (-1: none)."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos: int
    eos: int
    space_prefix: bool


def read_pieces(content: bytes) -> Pieces:
    """The vocabulary of a file.

    Raises ValueError for a file that is not one, or does to text what Llama's do not: another model than
    BPE, a normalisation, spaces removed.
    """
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                tokens.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        numbers = [*types, *(trainer.get(i, 0) for i in (3, 24, 41, 42))]
        numbers += [normalizer.get(i, 0) for i in (3, 4, 5)]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("bytes for a number")
        name = normalizer.get(1, b"identity").decode()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
        raise ValueError("not SentencePiece's, or damaged") from None
    if not tokens or len(set(tokens)) != len(tokens):
        raise ValueError(f"{len(tokens)} pieces or some twice, expected a vocabulary")
    if trainer.get(3, 1) != _BPE:
        raise ValueError(f"its model_type is {trainer.get(3, 1)}, expected {_BPE}: BPE, as Llama's")
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        raise ValueError(f"it changes text ({name!r}), expected 'identity' with all spaces kept")
    bos, eos = (i if i < len(tokens) else -1 for i in (trainer.get(41, 1), trainer.get(42, 2)))
    return Pieces(tokens, scores, types, bos, eos, bool(normalizer.get(3, 1)))


def sentencepiece_json(content: bytes, *, add_bos: bool = True, add_eos: bool = False) -> Json:
    """The `tokenizer.json` of a `tokenizer.model`. Raises ValueError as `read_pieces`.

    As in Hugging Face's, special tokens in the text are matched, unless `encode_special_tokens` is set on
    the tokenizer; SentencePiece never matches them.
    """
    pieces = read_pieces(content)
    unknown = pieces.types.index(UNKNOWN) if UNKNOWN in pieces.types else None
    ids = {token: i for i, token in enumerate(pieces.tokens)}
    before, after = (
        [pieces.tokens[i]] if add and i >= 0 else []
        for add, i in ((add_bos, pieces.bos), (add_eos, pieces.eos))
    )
    return tokenizer_json(
        added_tokens=[
            added_token(i, token, special=type_ != USER_DEFINED)
            for i, (token, type_) in enumerate(zip(pieces.tokens, pieces.types, strict=True))
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        post_processor=template(before, after, ids),
        **sentencepiece_parts(
            pieces.tokens,
            pieces.types,
            pieces.scores,
            unknown=None if unknown is None else pieces.tokens[unknown],
            prefix=pieces.space_prefix,
        ),
    )


def sentencepiece_parts(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    *,
    unknown: str | None,
    prefix: bool,
) -> Json:
    """Normaliser, model and decoder: spaces made visible, one more in front, no splitting.

    SentencePiece puts that space before the text even where it begins with one; so does the Prepend
    normaliser, while the newer Metaspace pre-tokenizer does not.
    """
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [visible],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        },
        "model": bpe(
            {token: i for i, token in enumerate(tokens)},
            merges_from_scores(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        ),
    }


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest; a merge list says the same.

    Every way to cut a piece into two pieces is a merge, ordered by the piece's score; among the cuts
    of equal score the one with the longer left part is first, as in Hugging Face's converter. Only
    normal pieces are joined: the others are matched whole or stand for single bytes.
    """
    normal = {
        t: i for i, (t, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == NORMAL
    }
    merges = []
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                merges.append((-scores[i], -len(left), -len(right), i, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while shift < 64:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    while position < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 2: varint() if kind == 2 else 0, 5: 4}[kind]
        if length > len(message) - position:
            raise ValueError("a field ends beyond the message")
        yield key >> 3, message[position : position + length]
        position += length
