"""Llama 3's `tokenizer.model`: tiktoken's ranks, one line `BASE64 RANK` per token.

Meta's `tokenizer.py` (github.com/meta-llama/llama-models) gives the regular expression that splits text
and the 256 special tokens after the ranks. tiktoken merges the two neighbors whose union has the lowest
rank; a piece that is a token already is not split at all.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.text.tokenizer_json import Json, added_token, bpe, template, tokenizer_json

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")
# by position; the others are reserved and numbered from 0, as in Hugging Face's tokenizer.json
_NAMED_3_0 = {
    0: BEGIN,
    1: END,
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_NAMED = _NAMED_3_0 | {
    4: "<|finetune_right_pad_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
}
_SPECIALS = 256


def special_tokens(*, release_3_0: bool = False) -> list[str]:
    """The 256 tokens after the ranks, in order, with the names of Llama 3.1 or of 3.0.

    The file itself is the same in both releases, so the caller has to tell them apart.
    """
    reserved, named = iter(range(_SPECIALS)), _NAMED_3_0 if release_3_0 else _NAMED
    return [
        named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(_SPECIALS)
    ]


def is_tiktoken(content: bytes) -> bool:
    """Whether a file looks like tiktoken ranks, judging by its first line."""
    return _LINE.fullmatch(content[:4096].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Token -> rank, counted from 0 without gaps; every single byte is a token.

    Raises:
        ValueError: anything else.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        match = _LINE.fullmatch(line.rstrip(b"\r"))
        if match is None:
            if not line.strip():
                continue
            raise ValueError(
                f"line {number} is {line[:40]!r}, expected a token in base64 and its rank"
            )
        try:
            token = base64.b64decode(match[1], validate=True)
        except binascii.Error:
            raise ValueError(f"line {number} is {line[:40]!r}, expected base64") from None
        if not token or token in ranks or int(match[2]) != len(ranks):
            raise ValueError(
                f"line {number} has rank {int(match[2])} or repeats a token, expected a new one with rank "
                f"{len(ranks)}"
            )
        ranks[token] = len(ranks)
    if len(missing := [i for i in range(256) if bytes([i]) not in ranks]):
        raise ValueError(
            f"{len(missing)} bytes have no token, first {missing[0]}, expected all 256"
        )
    return ranks


def tiktoken_json(
    content: bytes,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
    release_3_0: bool = False,
    cut_runs: bool = False,
) -> Json:
    """The `tokenizer.json` of a `tokenizer.model` of Llama 3. Raises ValueError as `read_ranks`.

    Args:
        release_3_0: see `special_tokens`.
        cut_runs: cut long texts as Meta's `tokenizer.py` does before tiktoken sees them: every 400,000
            characters, and after 25,000 characters in a row with or without white space.
    """
    ranks = read_ranks(content)
    tokens = special_tokens(release_3_0=release_3_0)
    specials = {token: len(ranks) + i for i, token in enumerate(tokens)}
    return _byte_level(
        ranks,
        added_tokens=[added_token(i, token, special=True) for token, i in specials.items()],
        post_processor=template([BEGIN] * add_bos, [END] * add_eos, specials),
        cut_runs=cut_runs,
    )


def plain_tiktoken_json(
    content: bytes, special_by_id: Mapping[int, str], extra: Sequence[str]
) -> Json:
    """The tokenizer that transformers 5 makes of any file of ranks. Raises ValueError as `read_ranks`.

    Args:
        special_by_id: special tokens; ids between them get reserved names.
        extra: further special tokens, which follow those.
    """
    ranks = read_ranks(content)
    last = max(special_by_id, default=0)
    if last > len(ranks) + _MAX_SPECIALS:
        raise ValueError(f"added_tokens_decoder has id {last} after {len(ranks)} ranks")
    after_ranks = range(len(ranks), last + 1)
    names = [special_by_id.get(i, f"<|reserved_token_{i}|>") for i in after_ranks]
    names = list(dict.fromkeys([*names, *extra]))
    vocab = {_text(token) for token in ranks}
    new = [name for name in names if name not in vocab]
    ids = {name: len(ranks) + i for i, name in enumerate(new)}
    ids |= {name: ranks[bytes(map(_BYTES.__getitem__, name))] for name in names if name in vocab}
    return _byte_level(
        ranks,
        added_tokens=[added_token(ids[name], name, special=True) for name in names],
        post_processor={**_BYTE_LEVEL, "trim_offsets": False, "use_regex": True},
    )


_MAX_SPECIALS = 1 << 20  # more means a damaged file
_BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _byte_level(ranks: Mapping[bytes, int], *, cut_runs: bool = False, **parts: Any) -> Json:
    split = _split(SPLIT, "Isolated")
    vocab = {_text(token): rank for token, rank in ranks.items()}
    merges = [(_text(left), _text(right)) for left, right in _merges(ranks)]
    steps = [*(_CUTS if cut_runs else ()), split, {**_BYTE_LEVEL, "use_regex": False}]
    return tokenizer_json(
        model=bpe(vocab, merges, ignore_merges=True),
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={**_BYTE_LEVEL, "use_regex": True},
        **parts,
    )


def _split(pattern: str, behavior: str) -> Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


def _run(inside: str) -> str:
    """Matches 25,000 characters of a longer run, then the next 25,000, and so on."""
    return rf"(?:\G|(?<!{inside})){inside}{{25000}}(?={inside})"


# The classes are Python's str.isspace. \G is where the last match ended. A repeat count must not exceed
# 100,000, hence the nested one.
_CUTS = (
    _split(r"(?:[\s\S]{1000}){400}", "Isolated"),
    _split(_run(r"[\s\x1c-\x1f]") + "|" + _run(r"[^\s\x1c-\x1f]"), "MergedWithPrevious"),
)


def tiktoken_model(tokenizer: Mapping[str, Any]) -> bytes | None:
    """The `tokenizer.model` of a `tokenizer.json` of Llama 3's form; None for any other.

    The inverse of `tiktoken_json`: the same ranks and merges, the same splitting, and as many special
    tokens after them as Llama 3 has.
    """
    vocab = _at(tokenizer, "model", "vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        return None
    tokens = sorted(vocab, key=vocab.__getitem__)
    if not all(character in _BYTES for token in tokens for character in token):
        return None
    ranked = [bytes(map(_BYTES.__getitem__, token)) for token in tokens]
    content = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranked))
    try:
        llama_3 = tiktoken_json(content)
    except ValueError:
        return None  # not every byte has a token
    if _encoding_rules(tokenizer) != _encoding_rules(llama_3):
        return None
    # the list of merges is in order of priority, which has to be that of the ranks
    merged = [vocab["".join(pair)] for pair in map(_pair, tokenizer["model"]["merges"]) if pair]
    return content if merged == sorted(merged) else None


def _encoding_rules(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the ids of a text in a `tokenizer.json`, apart from the order of merges."""
    added = _list(_at(tokenizer, "added_tokens"))
    steps = _list(_at(tokenizer, "pre_tokenizer", "pretokenizers"))
    split_fields = ("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex")
    return {
        "vocab": _at(tokenizer, "model", "vocab"),
        "merges": set(map(_pair, _list(_at(tokenizer, "model", "merges")))),
        "ignore_merges": _at(tokenizer, "model", "ignore_merges"),
        "normalizer": _at(tokenizer, "normalizer"),
        "splits": [[_at(step, field) for field in split_fields] for step in steps],
        "added ids": [_at(token, "id") for token in added],
        "begin and end": [_at(token, "content") for token in added][:2],
    }


def _at(value: Any, *keys: str) -> Any:
    """The value at nested keys of JSON objects; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to cut a token into two tokens, ordered by the rank of the merged token."""
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return merges


def _pair(merge: Any) -> tuple[str, ...] | None:
    """A merge as either form of tokenizer.json has it: "a b" or ["a", "b"]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return None
    return tuple(parts)


def _alphabet() -> list[str]:
    """GPT-2's characters for the 256 bytes: the byte's own character where it is visible."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(i) if i in visible else chr(next(others)) for i in range(256)]


_CHARACTERS = _alphabet()
_BYTES = {character: i for i, character in enumerate(_CHARACTERS)}


def _text(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))


def show_bytes(piece: str) -> str:
    """A piece of GPT-2's byte characters as `<0xE2>`, one per byte; any other piece unchanged."""
    if not all(character in _BYTES for character in piece):
        return piece
    if _BYTE_PIECE.fullmatch(piece):
        return piece
    return "".join(f"<0x{_BYTES[character]:02X}>" for character in piece)
