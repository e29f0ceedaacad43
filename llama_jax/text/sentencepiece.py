"""SentencePiece's `tokenizer.model` of the byte-pair kind, which Llama 1 and 2 have.

The file is a protobuf message `ModelProto` (google/sentencepiece, `sentencepiece_model.proto`). Of it
count the pieces with their scores and types, and a few options. SentencePiece joins the two neighbours
whose union scores highest.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.text.tokenizer_json import Json, added_token, bpe, template, tokenizer_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # the visible one
_BPE = 2  # trainer_spec.model_type


class Model(NamedTuple):
    """What a file holds: one of each for every id, and its options by their field numbers."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    trainer: dict[int, Any]
    normalizer: dict[int, Any]

    def vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Ids and merges as transformers 5 derives them: every way to cut a piece into two, by its id."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        cuts = [(token[:k], token[k:]) for token in ids for k in range(1, len(token))]
        merges = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        return ids, sorted(merges, key=lambda cut: (ids["".join(cut)], len(cut[0])))

    def names(self) -> dict[str, str]:
        """The special tokens, by Hugging Face's names."""
        places = {"unk": (40, 45, "<unk>"), "bos": (41, 46, "<s>"), "eos": (42, 47, "</s>")}
        return {
            f"{name}_token": self.trainer[text].decode() if self.trainer.get(text) else usual
            for name, (place, text, usual) in places.items()
            if _signed(self.trainer.get(place, 0)) >= 0
        }

    def whole_tokens(self) -> list[tuple[str, bool]]:
        """What is matched whole in the text, and whether it is special."""
        pairs = zip(self.tokens, self.types, strict=True)
        return [(t, type_ == CONTROL) for t, type_ in pairs if type_ in (CONTROL, USER_DEFINED)]


class Pieces(NamedTuple):
    """The vocabulary of a model like Llama's, and the ids of bos and eos (-1: none)."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos: int
    eos: int
    space_prefix: bool


def read_model(content: bytes) -> Model:
    """A file of any kind of SentencePiece's. Raises ValueError for one that is not."""
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
            raise TypeError("bytes for a number")
        for text in (texts[0], *texts[2:]):
            text.decode()
        texts[1].hex()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
        raise ValueError("not SentencePiece's, or damaged") from None
    if not tokens or len(set(tokens)) != len(tokens):
        raise ValueError(f"{len(tokens)} pieces or some twice, expected a vocabulary")
    return Model(tokens, scores, types, trainer, normalizer)


def read_pieces(content: bytes) -> Pieces:
    """The vocabulary of a file.

    Raises ValueError for a file that is not one, or does to text what Llama's do not: another model than
    BPE, a normalisation, spaces removed.
    """
    model = read_model(content)
    trainer, normalizer, count = model.trainer, model.normalizer, len(model.tokens)
    _require_bpe(model)
    if normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1) or trainer.get(24):
        name = normalizer.get(1, b"identity").decode()
        raise ValueError(f"it changes text ({name!r}), expected 'identity' with all spaces kept")
    bos, eos = (i if i < count else -1 for i in (trainer.get(41, 1), trainer.get(42, 2)))
    return Pieces(model.tokens, model.scores, model.types, bos, eos, bool(normalizer.get(3, 1)))


def _require_bpe(model: Model) -> None:
    if (kind := model.trainer.get(3, 1)) != _BPE:
        raise ValueError(f"its model_type is {kind}, expected {_BPE}: BPE, as Llama's")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def sentencepiece_json(content: bytes, *, add_bos: bool = True, add_eos: bool = False) -> Json:
    """The `tokenizer.json` of a `tokenizer.model`. Raises ValueError as `read_pieces`.

    As in Hugging Face's, special tokens in the text are matched, unless `encode_special_tokens` is set on
    the tokenizer; SentencePiece never matches them. User-defined pieces are matched as in SentencePiece:
    after the space was put in front, which is put before the text alone.
    """
    pieces = read_pieces(content)
    whole = {
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
            whole=whole,
        ),
    )


def metaspace_parts(*, prefix: bool, everywhere: bool, strip: bool) -> Json:
    """Normaliser, splitting and decoder as transformers 5 has them for Llama 2.

    Args:
        prefix: put a space before a text that has none there.
        everywhere: and before the text after each added token.
        strip: take it away again when decoding.
    """
    scheme = ("always" if everywhere else "first") if prefix else "never"
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


def hugging_face_json(model: Model, placed: Mapping[int, str]) -> Json:
    """What transformers 5 makes of a model whose class it does not know: no space in front.

    Args:
        placed: texts of tokens by id, for which some files hold the place.

    Raises:
        ValueError: not byte-pair encoding.
    """
    _require_bpe(model)
    vocab, merges = model.vocabulary()
    for i, text in placed.items():
        if i < len(model.tokens) and text not in vocab:
            del vocab[model.tokens[i]]
            vocab[text] = i
    steps: list[Json] = [_VISIBLE]
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
        decoder=_decoder() if fallback else {"type": "Sequence", "decoders": [_HIDDEN]},
    )


def sentencepiece_parts(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    *,
    unknown: str | None,
    prefix: bool,
    whole: Collection[str] = (),
) -> Json:
    """Normaliser, model and decoder: spaces made visible, one more in front, no splitting.

    SentencePiece puts that space before the text even where it begins with one; so does the Prepend
    normaliser, while the newer Metaspace pre-tokenizer does not.

    Args:
        whole: added tokens that are matched after all this. The library puts each of them through it
            too, and must find no space before it; so a text that is nothing else has none either.
    """
    space: Json = {"type": "Prepend", "prepend": SPACE}
    if whole:
        choices = "|".join(map(re.escape, sorted(whole)))
        space = {
            "type": "Replace",
            "pattern": {"Regex": rf"\A(?!(?:{choices})?\z)"},
            "content": SPACE,
        }
    return {
        "normalizer": {"type": "Sequence", "normalizers": [space] * prefix + [_VISIBLE]},
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


_VISIBLE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_HIDDEN: Json = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}


def _decoder(*, strip: bool = False) -> Json:
    steps: list[Json] = [_HIDDEN, {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * strip
    return {"type": "Sequence", "decoders": steps}


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
