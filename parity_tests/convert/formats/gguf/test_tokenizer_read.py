"""Tokenizers out of GGUF metadata: the same ids as the tokenizers they were made from."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from convert import convert
from convert.formats.gguf import read
from convert.formats.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llama_jax.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from parity_tests.convert.formats.gguf.tiny_gguf import tiny_gguf, tiny_model

CORPUS = [
    "The quick brown fox doesn't jump over 1234 lazy dogs; they're 56 years old, I'll bet.",
    "In 2024, the 3rd x² test cost $1,000.50 (or 900 €)! What? Yes... no-one's sure.",
    "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(12))\r\n\t\tend",
    "Größe, naïveté, Ελλάδα, Москва, 東京都 2020年, 서울, العربية ١٢٣, हिन्दी",
    "the then there these other another mother father weather whether together",
] * 4
UNREACHED = "\u0120zebra"  # " zebra": in the vocabulary, but no merges lead to it
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

HARD = [
    "", "a", " ", "  ", "   x", "x   ", "Hello, world!", "\n", "\n\n\nfoo\t\tbar\r\n \r\n", "a\n b",
    "don't I'LL we've THEY'RE o'clock 's", "2024-01-02 3.14159 1,000,000", " 7 8  9 word123word 4x",
    "x² ½ ٣٤ Ⅷ 五 ੩", "éàü ñ ß İı ǅ", "中文测试 日本語 한국어", "🙂👨‍👩‍👧‍👦🏳️‍🌈", "a\u0301 e\u0308 क्षि",
    "\u200b\ufeff\u00a0 nbsp\u2003em \u2028", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>x",
    "<|im_start|><|im_start|> <|im_end|>  ", "<think>a b</think>", "https://x.y/z?a=1&b=%20#",
    "\x00\x01\x7f", "العربية עברית ไทย", "a" * 100, " " * 30 + "b", "\ud7ff\ue000\uffff\U0010ffff",
    "▁ visible ▁▁", "the▁the", "!!!???...", "$$$+++<<<===>>>^^^~~~|||", "A1b2C3",
    "a zebra", "\u4e00\u4e8c3\u4e09",
]  # fmt: skip


@cache
def hard_strings() -> list[str]:
    rng = random.Random(0)

    def character() -> str:
        ranges = [(32, 127), (32, 127), (0x30, 0x3A), (0x20, 0x2000), (0x4E00, 0x9FFF), (9, 14)]
        return chr(rng.randrange(*rng.choice([*ranges, (0x1F300, 0x1F700)])))

    return HARD + ["".join(character() for _ in range(rng.randrange(1, 25))) for _ in range(400)]


@cache
def trained_byte_level() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tokens, merges) of a byte-level BPE trained on CORPUS; specials first, as in SmolLM2.

    The splitting is loose (runs of digits with a space in front, punctuation with letters), so that
    there are merges across every boundary that one of the pre-tokenizers has to keep.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n\n\n\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        max_token_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = tuple(sorted(state["vocab"], key=state["vocab"].get))
    return tokens, tuple(" ".join(merge) for merge in state["merges"])


def byte_level_fields(pre: str, **extra: Any) -> dict[str, Any]:
    tokens, merges = trained_byte_level()
    types = [CONTROL if token in SPECIAL else NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, UNREACHED, "<think>", "</think>"],
        "tokenizer.ggml.token_type": [*types, NORMAL, USER_DEFINED, USER_DEFINED],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    } | {f"tokenizer.{key}": value for key, value in extra.items()}


def converted(tmp_path: Path, fields: dict[str, Any], name: str = "out") -> Path:
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]), num_hidden_layers=1)
    return convert(tiny_gguf(tmp_path / f"{name}.gguf", model, fields=fields), tmp_path / name)


# --- byte-level BPE, against the regular expressions of llama.cpp's llama-vocab.cpp ------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA_CPP = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [HEAD + r"|\p{N}{1,3}" + TAIL],
    "smaug-bpe": [HEAD + r"|\p{N}{1,3}" + TAIL],
    "qwen2": [HEAD + r"|\p{N}" + TAIL],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}  # fmt: skip


def split(text: str, patterns: list[str]) -> list[str]:
    """llama.cpp's splitting: each expression cuts its matches out of what the earlier ones left."""
    pieces = [text]
    for pattern in patterns:
        finer = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                finer += [piece[end : match.start()], match[0]]
                end = match.end()
            finer.append(piece[end:])
        pieces = [piece for piece in finer if piece]
    return pieces


def merge(piece: str, ranks: dict[tuple[str, str], int], unmerged: set[str]) -> list[str]:
    """Plain BPE: join the pair of lowest rank, leftmost first, until there is none."""
    parts = [byte_alphabet()[b] for b in piece.encode()]
    if "".join(parts) in unmerged:
        return ["".join(parts)]
    while True:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts))]
        rank, i = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@cache
def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0 to 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


@pytest.mark.parametrize("pre", list(LLAMA_CPP))
def test_byte_level_ids_are_llama_cpps(tmp_path: Path, pre: str) -> None:
    fields = byte_level_fields(pre)
    directory = converted(tmp_path, fields)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = fields["tokenizer.ggml.merges"]
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
    unmerged = set(tokens) if pre == "llama-bpe" else set()
    special = regex.compile(
        "(" + "|".join(map(regex.escape, [*SPECIAL, "<think>", "</think>"])) + ")"
    )
    for text in hard_strings():
        expected = []
        for part in special.split(text):
            if part in ids and special.fullmatch(part):
                expected.append(ids[part])
            else:
                for piece in split(part, LLAMA_CPP[pre]):
                    expected += [ids[token] for token in merge(piece, ranks, unmerged)]
        assert tokenizer.encode(text).ids == expected, repr(text)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "qwen2"])
def test_byte_level_ids_are_those_of_transformers_own_gguf_reader(tmp_path: Path, pre: str) -> None:
    # Its reader has no entry for smollm and the like, and does not know that Llama 3's and Tekken's
    # kind takes a whole piece from the vocabulary without merges.
    directory = converted(tmp_path, byte_level_fields(pre))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    ours = AutoTokenizer.from_pretrained(directory)
    for text in hard_strings():
        if "zebra" not in text:
            assert ours(text).input_ids == theirs(text).input_ids, repr(text)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_loads_and_loses_nothing(tmp_path: Path, pre: str) -> None:
    directory = converted(tmp_path, byte_level_fields(pre))
    ours = AutoTokenizer.from_pretrained(directory)
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in hard_strings()[:100]:
        ids = ours(text).input_ids
        assert raw.encode(text).ids == ids
        assert ours.decode(ids) == text


def test_special_and_user_defined_tokens(tmp_path: Path) -> None:
    ours = AutoTokenizer.from_pretrained(converted(tmp_path, byte_level_fields("smollm")))
    ids = ours("<|im_start|>a<think>b</think><|im_end|>").input_ids
    assert ours.decode(ids, skip_special_tokens=True) == "a<think>b</think>"
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        SPECIAL[0],
    )
    assert ours.pad_token is None
    assert ours.model_max_length == 64
    assert len(ours) == len(trained_byte_level()[0]) + 3


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (None, None)])
def test_bos_and_eos_around_each_text(tmp_path: Path, bos: bool | None, eos: bool | None) -> None:
    extra = {"ggml.add_bos_token": bos, "ggml.add_eos_token": eos}
    directory = converted(tmp_path, byte_level_fields("llama-bpe", **extra))
    ours = AutoTokenizer.from_pretrained(directory)
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain = ours("ab", add_special_tokens=False).input_ids
    before = [1] if bos is not False else []  # llama.cpp adds bos to this kind unless told not to
    after = [2] if eos else []
    assert ours("ab").input_ids == raw.encode("ab").ids == before + plain + after
    assert raw.encode("ab", "ab").ids == (before + plain + after) * 2
    assert ours("ab", "ab").input_ids == (before + plain + after) * 2


# --- SentencePiece -----------------------------------------------------------------------------------


@cache
def trained_sentencepiece() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    return out.getvalue()


def sentencepiece_fields(**extra: Any) -> dict[str, Any]:
    model = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    size = model.vocab_size()

    def type_(i: int) -> int:
        if model.id_to_piece(i) == "<think>":
            return USER_DEFINED
        kinds = {UNKNOWN: model.is_unknown, CONTROL: model.is_control, BYTE: model.is_byte}
        return next((kind for kind, holds in kinds.items() if holds(i)), NORMAL)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [type_(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.{key}": value for key, value in extra.items()}


def test_sentencepiece_ids_and_text_are_sentencepieces_own(tmp_path: Path) -> None:
    directory = converted(tmp_path, sentencepiece_fields())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    ours = AutoTokenizer.from_pretrained(directory)
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    compared = 0
    for text in hard_strings():
        if "<think>" in text:
            continue  # llama.cpp and Hugging Face put a space after it, SentencePiece does not
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == theirs.encode(text), repr(text)
        assert ours(text).input_ids == raw.encode(text).ids == [1, *ids]
        assert ours.decode(ids) == theirs.decode(ids)
        compared += 1
    assert compared > 400


def test_sentencepiece_ids_are_those_of_transformers_own_gguf_reader(tmp_path: Path) -> None:
    ours = AutoTokenizer.from_pretrained(converted(tmp_path, sentencepiece_fields()))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    for text in hard_strings():
        # Its Metaspace adds no space to a text that begins with one, against SentencePiece; nor after
        # added tokens, against llama.cpp.
        if not text.startswith((" ", "▁")) and "<" not in text:
            assert ours(text).input_ids == theirs(text).input_ids, repr(text)


def test_without_the_space_prefix(tmp_path: Path) -> None:
    fields = sentencepiece_fields(**{"ggml.add_space_prefix": False, "ggml.add_bos_token": False})
    ours = AutoTokenizer.from_pretrained(converted(tmp_path, fields))
    assert ours("the").tokens()[0] == "the"
    assert ours.decode(ours(" the").input_ids) == " the"


# --- chat templates, and what is refused -------------------------------------------------------------


def test_chat_templates_are_converted(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}\n"
    tools = "tools: {{ tools }}"
    extra = {"chat_template": template, "chat_template.tool_use": tools}
    directory = converted(tmp_path, byte_level_fields("smollm", **extra))
    assert (directory / "chat_template.jinja").read_text() == template
    assert (
        json.loads((directory / "tokenizer_config.json").read_text())["chat_template"] == template
    )
    ours = AutoTokenizer.from_pretrained(directory)
    text = ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|im_start|>Hi"
    assert ours.get_chat_template("tool_use") == tools


def test_a_template_name_cannot_leave_the_directory(tmp_path: Path) -> None:
    fields = byte_level_fields("smollm", **{"chat_template.../../../evil": "x"})
    with pytest.raises(ValueError, match="is not a name for a chat template"):
        converted(tmp_path, fields)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ggml.model", "bert", "tokenizer.ggml.model is 'bert', expected 'gpt2' or 'llama'"),
        ("ggml.pre", "klingon", "tokenizer.ggml.pre is 'klingon', expected one of codeshell, "),
        ("ggml.merges", ["x y z"], "merge 0, 'x y z', has parts or a result that are not tokens"),
        ("ggml.merges", ["xy"], "merge 0, 'xy', has parts"),
        ("ggml.token_type", [1], "tokenizer.ggml.token_type does not have"),
        ("ggml.token_type", "floats", "tokenizer.ggml.token_type is not an array of integers"),
        ("ggml.pre", ["smollm"], r"tokenizer.ggml.pre is \['smollm'\], expected one of"),
    ],
)
def test_tokenizers_that_cannot_be_converted(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    fields = byte_level_fields("smollm")
    value = [1.0] * len(fields["tokenizer.ggml.tokens"]) if value == "floats" else value
    fields |= {f"tokenizer.{key}": value}
    with pytest.raises(
        ValueError, match=f"{message}.*use --no-tokenizer to convert the weights alone"
    ):
        converted(tmp_path, fields)
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    path = tiny_gguf(tmp_path / "m.gguf", model, fields=fields)
    convert(path, tmp_path / "weights", tokenizer=False)
    assert not (tmp_path / "weights/tokenizer.json").exists()


def test_duplicate_tokens_are_named(tmp_path: Path) -> None:
    fields = byte_level_fields("smollm")
    fields["tokenizer.ggml.tokens"][-1] = "a"
    with pytest.raises(ValueError, match=r"tokens \d+ and \d+ are both 'a'"):
        converted(tmp_path, fields)


def test_a_file_that_names_no_pre_tokenizer_gets_a_note(tmp_path: Path) -> None:
    fields = byte_level_fields("smollm") | {"tokenizer.ggml.pre": None}
    model = tiny_model(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    checkpoint = read(tiny_gguf(tmp_path / "m.gguf", model, fields=fields))
    assert any("GPT-2's way" in note for note in checkpoint.notes)
