"""SentencePiece's `tokenizer.model` with a byte-pair model, as in Llama 1 and 2.

The file is a protobuf message `ModelProto` (google/sentencepiece, `sentencepiece_model.proto`): pieces
with scores and types, and options. SentencePiece merges the two neighbors whose union scores highest.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.text.tokenizer_json import Json, added_token, bpe, template, tokenizer_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # stands for a space
_BPE = 2  # trainer_spec.model_type


class Model(NamedTuple):
    """The content of a file.

    Attributes:
        tokens, scores, types: one entry per id.
        trainer, normalizer: options by their field numbers in the protobuf message.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]

    def vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Ids and merges as in transformers 5: every way to cut a piece into two, ordered by id."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        cuts = [(token[:k], token[k:]) for token in ids for k in range(1, len(token))]
        merges = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        return ids, sorted(merges, key=lambda cut: (ids["".join(cut)], len(cut[0])))

    def names(self) -> dict[str, str]:
        """The special tokens, by Hugging Face's names."""
        # the fields with the id and the text, and the text's default
        fields = {"unk": (40, 45, "<unk>"), "bos": (41, 46, "<s>"), "eos": (42, 47, "</s>")}
        names = {}
        for name, (id_field, text_field, default) in fields.items():
            if _signed(self.trainer.get(id_field, 0)) >= 0:
                text = self.trainer.get(text_field)
                names[f"{name}_token"] = text.decode() if text else default
        return names

    def matched_tokens(self) -> list[tuple[str, bool]]:
        """Tokens that are matched in the text as a unit, and whether each is special."""
        pairs = zip(self.tokens, self.types, strict=True)
        return [(t, type_ == CONTROL) for t, type_ in pairs if type_ in (CONTROL, USER_DEFINED)]


class Pieces(NamedTuple):
    """The vocabulary of a Llama tokenizer, and the ids of bos and eos (-1: none)."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos: int
    eos: int
    space_prefix: bool


def read_model(content: bytes) -> Model:
    """Parse a SentencePiece file of any model type. Raises ValueError for any other file."""
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
        numbers = [*types, *(trainer.get(i, 0) for i in (3, 24, 35, 40, 41, 42))]
        numbers += [normalizer.get(i, 0) for i in (3, 4, 5)]
        texts = [normalizer.get(1, b""), normalizer.get(2, b"")]
        texts += [trainer.get(i, b"") for i in (45, 46, 47)]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("found bytes, expected a number")
        for text in (texts[0], *texts[2:]):
            text.decode()
        texts[1].hex()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
        raise ValueError("not a SentencePiece model, or damaged") from None
    if not tokens or len(set(tokens)) != len(tokens):
        raise ValueError(f"found {len(tokens)} pieces, expected a vocabulary without duplicates")
    return Model(tokens, scores, types, trainer, normalizer)


def read_pieces(content: bytes) -> Pieces:
    """The vocabulary of a Llama tokenizer.

    Raises:
        ValueError: not a SentencePiece file, or one that treats text in another way than Llama's do:
            not BPE, with normalization, or with spaces removed.
    """
    model = read_model(content)
    trainer, normalizer, count = model.trainer, model.normalizer, len(model.tokens)
    _require_bpe(model)
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        name = normalizer.get(1, b"identity").decode()
        raise ValueError(
            f"its normalization ({name!r}) changes text, expected 'identity' with all spaces kept"
        )
    bos, eos = (i if i < count else -1 for i in (trainer.get(41, 1), trainer.get(42, 2)))
    return Pieces(model.tokens, model.scores, model.types, bos, eos, bool(normalizer.get(3, 1)))


def _require_bpe(model: Model) -> None:
    if (kind := model.trainer.get(3, 1)) != _BPE:
        raise ValueError(f"its model_type is {kind}, expected {_BPE} (BPE)")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def sentencepiece_json(content: bytes, *, add_bos: bool = True, add_eos: bool = False) -> Json:
    """The `tokenizer.json` equivalent to a `tokenizer.model`. Raises ValueError as `read_pieces`.

    As in Hugging Face, special tokens in the text are recognized unless `encode_special_tokens` is set on
    the tokenizer; SentencePiece never recognizes them. User-defined pieces are matched as in SentencePiece,
    after a space was put before the text.
    """
    pieces = read_pieces(content)
    user_defined = {
        t for t, type_ in zip(pieces.tokens, pieces.types, strict=True) if type_ == USER_DEFINED
    }
    unknown = pieces.types.index(UNKNOWN) if UNKNOWN in pieces.types else None
    ids = {token: i for i, token in enumerate(pieces.tokens)}
    before, after = (
        [pieces.tokens[i]] if add and i >= 0 else []
        for add, i in ((add_bos, pieces.bos), (add_eos, pieces.eos))
    )
    return tokenizer_json(
        added_tokens=[
            added_token(i, token, special=type_ != USER_DEFINED, normalized=type_ == USER_DEFINED)
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
            user_defined=user_defined,
        ),
    )


def metaspace_parts(*, prefix: bool, after_added_tokens: bool, strip: bool) -> Json:
    """Normalizer, pre-tokenizer and decoder that transformers 5 builds for Llama 2.

    Args:
        prefix: put a space before a text that does not begin with one.
        after_added_tokens: with `prefix`, also put one before the text after each added token.
        strip: remove that space when decoding.
    """
    scheme = ("always" if after_added_tokens else "first") if prefix else "never"
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": scheme,
            "split": False,
        },
        "decoder": _decoder(strip=strip),
    }


def hugging_face_json(model: Model, added_by_id: Mapping[int, str]) -> Json:
    """The tokenizer that transformers 5 builds for a class it does not know: no space before the text.

    Args:
        added_by_id: texts of added tokens, which replace pieces that some files keep free for them.

    Raises:
        ValueError: not byte-pair encoding.
    """
    _require_bpe(model)
    vocab, merges = model.vocabulary()
    for i, text in added_by_id.items():
        if i < len(model.tokens) and text not in vocab:
            del vocab[model.tokens[i]]
            vocab[text] = i
    steps: list[Json] = [_SHOW_SPACES]
    if charsmap := model.normalizer.get(2):
        encoded = base64.b64encode(charsmap).decode()
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": encoded})
    fallback = bool(model.trainer.get(35))
    return tokenizer_json(
        added_tokens=[],
        model=bpe(
            vocab,
            merges,
            unk_token=model.trainer.get(45, b"<unk>").decode(),
            fuse_unk=True,
            byte_fallback=fallback,
        ),
        normalizer={"type": "Sequence", "normalizers": steps},
        decoder=_decoder() if fallback else {"type": "Sequence", "decoders": [_HIDE_SPACES]},
    )


def sentencepiece_parts(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    *,
    unknown: str | None,
    prefix: bool,
    user_defined: Collection[str] = (),
) -> Json:
    """Normalizer, model and decoder as in SentencePiece: a space before the text, then no splitting.

    SentencePiece puts that space before the text even if it begins with one. So does the Prepend
    normalizer; the newer Metaspace pre-tokenizer does not.

    Args:
        user_defined: added tokens that are matched after normalization. `tokenizers` normalizes the tokens
            too, which must not put a space before them; hence a text that is just such a token has none.
    """
    space: Json = {"type": "Prepend", "prepend": SPACE}
    if user_defined:
        choices = "|".join(map(re.escape, sorted(user_defined)))
        space = {
            "type": "Replace",
            "pattern": {"Regex": rf"\A(?!(?:{choices})?\z)"},
            "content": SPACE,
        }
    return {
        "normalizer": {"type": "Sequence", "normalizers": [space] * prefix + [_SHOW_SPACES]},
        "pre_tokenizer": None,
        "decoder": _decoder(strip=prefix),
        "model": bpe(
            {token: i for i, token in enumerate(tokens)},
            merges_from_scores(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        ),
    }


_SHOW_SPACES: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_HIDE_SPACES: Json = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}


def _decoder(*, strip: bool = False) -> Json:
    steps: list[Json] = [_HIDE_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * strip
    return {"type": "Sequence", "decoders": steps}


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """A list of merges equivalent to SentencePiece's scores.

    Every way to cut a piece into two pieces is a merge, ordered by the piece's score; among cuts of equal
    score the one with the longer left part comes first, as in Hugging Face's converter. Only normal pieces
    are merged: the others are matched as a unit or stand for single bytes.
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
    """The fields of a protobuf message: field number, and an integer or bytes."""
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
        raise ValueError("a varint of more than 64 bits")

    while position < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 2: varint() if kind == 2 else 0, 5: 4}[kind]
        if length > len(message) - position:
            raise ValueError("a field extends beyond the message")
        yield key >> 3, message[position : position + length]
        position += length
