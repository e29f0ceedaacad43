"""Llama 3's `tokenizer.model`: tiktoken's ranks, a line `BASE64 RANK` for each token.

Meta's `tokenizer.py` (github.com/meta-llama/llama-models) gives the regular expression that splits text
and the 256 special tokens after the ranks. tiktoken joins the two neighbours whose union has the lowest
rank, and takes a whole piece that has one.
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
# by place; those between are reserved, counted from 0, as in Hugging Face's tokenizer.json
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
    """The tokens after the ranks, in order, by the names that Llama 3.1 gave them, or 3.0.

    The file is the same in both releases: which one it is, the model beside tells.
    """
    reserved, named = iter(range(_SPECIALS)), _NAMED_3_0 if release_3_0 else _NAMED
    return [
        named.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(_SPECIALS)
    ]


def is_tiktoken(content: bytes) -> bool:
    """Whether a file looks like one, by its first line."""
    return _LINE.fullmatch(content[:4096].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Token -> rank, from 0 without gaps, every single byte among them.

    Raises ValueError for anything else.
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
                f"line {number} has rank {int(match[2])} or a token twice, expected {len(ranks)}"
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
        cut_runs: cut as Meta's `tokenizer.py` does before tiktoken sees the text: every 400,000
            characters, and where a run of 25,000 with or of 25,000 without white space goes on.
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


def plain_tiktoken_json(content: bytes, placed: Mapping[int, str], extra: Sequence[str]) -> Json:
    """What transformers 5 makes of a file of ranks, Llama 3's or not. Raises ValueError as `read_ranks`.

    Args:
        placed: the special tokens by id; the ids between get names too.
        extra: further ones, after those.
    """
    ranks = read_ranks(content)
    last = max(placed, default=0)
    if last > len(ranks) + _MOST_SPECIALS:
        raise ValueError(f"added_tokens_decoder has id {last} after {len(ranks)} ranks")
    names = [placed.get(i, f"<|reserved_token_{i}|>") for i in range(len(ranks), last + 1)]
    names = list(dict.fromkeys([*names, *extra]))
    vocab = {_text(token) for token in ranks}
    fresh = [name for name in names if name not in vocab]
    ids = {name: len(ranks) + i for i, name in enumerate(fresh)}
    ids |= {name: ranks[bytes(map(_BYTES.__getitem__, name))] for name in names if name in vocab}
    return _byte_level(
        ranks,
        added_tokens=[added_token(ids[name], name, special=True) for name in names],
        post_processor={**_BYTE_LEVEL, "trim_offsets": False, "use_regex": True},
    )


_MOST_SPECIALS = 1 << 20  # more is a damaged file
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
    """The first 25,000 of a run that goes on, and the next ones."""
    return rf"(?:\G|(?<!{inside})){inside}{{25000}}(?={inside})"


# Python's str.isspace; \G is where the last match ended; (a number must not be above 100,000)
_CUTS = (
    _split(r"(?:[\s\S]{1000}){400}", "Isolated"),
    _split(_run(r"[\s\x1c-\x1f]") + "|" + _run(r"[^\s\x1c-\x1f]"), "MergedWithPrevious"),
)


def tiktoken_model(tokenizer: Mapping[str, Any]) -> bytes | None:
    """The `tokenizer.model` of a `tokenizer.json` of Llama 3's form; None where it has another.

    The inverse of `tiktoken_json`: the same ranks and merges, split in the same way, and Llama 3's number
    of special tokens after them.
    """
    try:
        vocab = tokenizer["model"]["vocab"]
        tokens = sorted(vocab, key=vocab.__getitem__)
        ranks = {bytes(map(_BYTES.__getitem__, token)): i for i, token in enumerate(tokens)}
        content = b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())
        ours, theirs = tiktoken_json(content), dict(tokenizer)
        made = [vocab["".join(_pair(merge))] for merge in theirs["model"]["merges"]]
        same = (
            made == sorted(made)
            and ours["model"]["vocab"] == vocab
            and {tuple(m) for m in ours["model"]["merges"]}
            == set(map(_pair, theirs["model"]["merges"]))
            and ours["model"]["ignore_merges"] == theirs["model"].get("ignore_merges")
            and theirs["normalizer"] is None
            and _splits(theirs["pre_tokenizer"]) == _splits(ours["pre_tokenizer"])
            and [token["id"] for token in theirs["added_tokens"]]
            == [token["id"] for token in ours["added_tokens"]]
            and [token["content"] for token in theirs["added_tokens"]][:2] == [BEGIN, END]
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return content if same else None


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to cut a token into two tokens, in the order of the ranks of what they make."""
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return merges


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)


def _splits(pre_tokenizer: Json) -> list[tuple[Any, ...]]:
    """What decides how text is split."""
    keys = ("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex")
    return [tuple(step.get(key) for key in keys) for step in pre_tokenizer["pretokenizers"]]


def _alphabet() -> list[str]:
    """GPT-2's stand-ins for the 256 bytes: themselves where they can be seen."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(i) if i in visible else chr(next(others)) for i in range(256)]


_CHARACTERS = _alphabet()
_BYTES = {character: i for i, character in enumerate(_CHARACTERS)}


def _text(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))


def bytes_shown(piece: str) -> str:
    """A piece of GPT-2's stand-ins by its bytes, `<0xE2>` each; another as it is."""
    if not all(character in _BYTES for character in piece):
        return piece
    if _BYTE_PIECE.fullmatch(piece):
        return piece
    return "".join(f"<0x{_BYTES[character]:02X}>" for character in piece)
