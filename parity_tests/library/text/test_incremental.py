"""Decoding tokens one at a time gives the same text as all at once, with any decoder."""

import json
from collections.abc import Sequence
from os import path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from llama_jax.text.detokenize import continuation_text
from llama_jax.text.incremental import IncrementalDecoder
from llama_jax.text.tokenizer import model_json
from parity_tests.harness.tiny_tokenizers import HARD, sentencepiece_model, tiktoken_model

SPECIAL = ["<s>", "</s>", "<|im_end|>"]
# bytes of a space, A, ไ, 🙂, U+FFFD and é, and one that is never in UTF-8
BYTES = [f"<0x{byte:02X}>" for byte in b" A\xe0\xb9\x84\xf0\x9f\x99\x82\xef\xbf\xbd\xc3\xa9\xff"]
PIECES = [
    *(
        "a",
        "▁a",
        "▁",
        "▁▁",
        "b.",
        "\ufffd",
        "##ing",
        "hello</w>",
        "don't",
        "n't",
        " ' s",
        "ไ",
        ".",
        "",
    ),
    *("▁b▁", "</w>", "|", "<pad>", "x y"),
]
# incomplete characters, joined in all ways, and sequences that never become one
PARTS = [
    *(b"\xf0", b"\x9f", b"\x99\x82", b"\x99\x82\xf0\x9f", b"\x99", b"\x82", b"a", b"a\xe0", b" a"),
    *(
        b"\xb9",
        b"\xb9\x84",
        b"\x84b",
        b"\xef\xbf\xbd",
        b"\xef\xbf",
        b"\xbd",
        b"\xff",
        b" ",
        b"\xed",
    ),
    *(b"\xa0", b"\xf4", b"\x90", b"\xc0", b"\x80", b"\xe0\xb9"),
]
_SPACES, _LEFT = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
_BYTES, _FUSE = decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "llama 2": decoders.Sequence([_SPACES, _BYTES, _FUSE, _LEFT]),
    "gemma": decoders.Sequence([_SPACES, _BYTES, _FUSE]),
    "two spaces stripped": decoders.Sequence([_SPACES, _BYTES, _FUSE, decoders.Strip(" ", 2, 0)]),
    "each token stripped": decoders.Sequence([_SPACES, _LEFT]),
    "byte fallback": _BYTES,
    "byte fallback, metaspace": decoders.Sequence([_BYTES, decoders.Metaspace()]),
    "unigram": decoders.Metaspace(),
    "no space before": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece, not cleaned up": decoders.WordPiece(cleanup=False),
    "end of word": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "none": None,
    "text after it is joined": decoders.Sequence([_FUSE, decoders.Replace(Regex(" +"), "_")]),
}


def byte_letters() -> dict[int, str]:
    """The character of each byte in byte-level tokenizers, according to `tokenizers`."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = {}
    for character in map(chr, [*range(0x80), *range(0x80, 0x800), 0x800, 0x10000]):
        (written, _), *_ = level.pre_tokenize_str(character)
        letters |= dict(zip(character.encode(), written, strict=True))
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters.values()))
    # those of no character above are in order too
    return letters | dict(zip(sorted(set(range(256)) - set(letters)), others, strict=True))


def made(name: str) -> Tokenizer:
    if name in ("sentencepiece", "tiktoken"):
        content = sentencepiece_model() if name == "sentencepiece" else tiktoken_model()
        return Tokenizer.from_str(json.dumps(model_json(content)))
    if name == "byte level":
        letters = byte_letters()
        pieces = ["".join(letters[byte] for byte in part) for part in PARTS]
        tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
        tokenizer.decoder = decoders.ByteLevel()
    else:
        pieces = BYTES + PIECES
        tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}))
        if DECODERS[name] is not None:
            tokenizer.decoder = DECODERS[name]
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = {name: made(name) for name in (*DECODERS, "byte level", "sentencepiece", "tiktoken")}


def parts_of(
    tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], **options: Any
) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, prompt, **options)
    return [*(decoder.push(token) for token in new), decoder.finish()]


@st.composite
def ids_and_cut(draw: st.DrawFn, size: int) -> tuple[list[int], int]:
    few = st.lists(st.integers(0, size - 1), min_size=1, max_size=4)
    some = draw(st.one_of(few, st.just(list(range(size)))))
    ids = draw(st.lists(st.sampled_from(some), max_size=24))
    return ids, draw(st.integers(0, len(ids)))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_parts_add_up_to_the_text(name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(ids_and_cut(tokenizer.get_vocab_size() + 1))  # includes one id that is not a token
    def check(case: tuple[list[int], int]) -> None:
        ids, cut = case
        parts = parts_of(tokenizer, ids[:cut], ids[cut:], skip_special_tokens=skip)
        before = tokenizer.decode(ids[:cut], skip_special_tokens=skip)
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        # a prompt may end within a character, which is then part of what is new
        shared = path.commonprefix((before, text))  # noqa: RUF071
        assert shared + "".join(parts) == text

    check()


@pytest.mark.parametrize("name", ["sentencepiece", "tiktoken"])
@pytest.mark.parametrize("text", ["ไทยไทยไทยไทย", "🙂👨‍👩‍👧", "a\ufffdb\ufffd", *HARD])
def test_a_text_round_trips(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for prompt in ("", "so: ", "ไ"):
        first = tokenizer.encode(prompt).ids
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        parts = parts_of(tokenizer, first, ids)
        assert tokenizer.decode(first) + "".join(parts) == tokenizer.decode(first + ids)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sentencepiece", "the other weather, mississippi"),
        ("tiktoken", "the other 🙂, mississippi"),
    ],
)
def test_text_is_not_later_than_from_decode_stream(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    decoder, theirs = IncrementalDecoder(tokenizer, []), decoders.DecodeStream([], True)
    for token in tokenizer.encode(text).ids:
        assert decoder.push(token) == (theirs.step(tokenizer, token) or "")


def test_a_character_is_returned_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["tiktoken"]
    ids = tokenizer.encode("🙂🙂", add_special_tokens=False).ids
    parts = parts_of(tokenizer, [], ids)
    assert "".join(parts) == "🙂🙂"
    assert parts[len(ids) // 2 - 1] == "🙂"
    assert parts[-1] == ""


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.count += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("llama 2", ["▁a"]),
        ("llama 2", ["▁"]),
        ("llama 2", ["<0xE0>", "<0xB9>", "<0x84>"]),
        ("llama 2", ["<0xFF>"]),
        ("llama 2", ["<s>"]),
        ("llama 2", ["\ufffd"]),
        ("wordpiece", ["##ing", "."]),
        ("none", [""]),
        ("byte level", [PARTS.index(b"\xef\xbf\xbd")]),
        ("byte level", [PARTS.index(b"\xff")]),
        ("byte level", [PARTS.index(b"\x99\x82\xf0\x9f")]),
    ],
)
def test_work_does_not_grow_with_the_text(name: str, pieces: list[str | int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [tokenizer.token_to_id(p) if isinstance(p, str) else p for p in pieces]
    counting = Counting(tokenizer)
    new = ids * 600
    parts = parts_of(counting, ids * 600, new)  # type: ignore[arg-type]
    assert counting.count <= 20 * len(new)
    # and nothing waits that need not
    if not str(pieces[0]).startswith("<0x"):
        assert parts[-1] in ("", "\ufffd")


def test_continuation_text() -> None:
    tokenizer = TOKENIZERS["llama 2"]
    a, e0, b9, x84 = map(tokenizer.token_to_id, ("▁a", "<0xE0>", "<0xB9>", "<0x84>"))
    assert continuation_text(tokenizer, [], [a, a]) == "a a"
    assert continuation_text(tokenizer, [a], [a]) == " a"
    assert continuation_text(tokenizer, [a, e0], [b9, x84]) == "ไ"
    assert continuation_text(tokenizer, [a, e0], [a]) == " a"
