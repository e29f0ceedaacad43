"""Each tokenizer format gives the ids of its reference library."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llama_jax.text.tiktoken import special_tokens, tiktoken_json
from llama_jax.text.tiktoken import tiktoken_model as model_of
from llama_jax.text.tokenizer import load_tokenizer, model_json
from parity_tests.harness.tiny_tokenizers import (
    HARD,
    sentencepiece_model,
    tiktoken_encoding,
    tiktoken_model,
    tiktoken_ranks,
)

TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("ab ", max_size=40),
    st.text("thera ▁ns'\n1", max_size=60),
    st.lists(st.sampled_from(HARD), max_size=4).map("".join),
)
FORMS = {"sentencepiece": sentencepiece_model, "tiktoken": tiktoken_model}


def loaded(path: Path, content: bytes, **options: Any) -> Tokenizer:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(content)
    if options:
        (path / "tokenizer_config.json").write_text(json.dumps(options))
    return load_tokenizer(path)


def made(content: bytes, **options: bool) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(model_json(content, **options)))


# --- SentencePiece -----------------------------------------------------------------------------------


def require_sentencepieces_ids(content: bytes, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = made(content)
    ours.encode_special_tokens = True  # SentencePiece never finds control symbols in text
    expected = theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)
    assert ours.encode(text).ids == [theirs.bos_id(), *expected]
    assert ours.decode(expected) == theirs.decode(expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"vocab_size": 420}, {"character_coverage": 1.0}],
    ids=str,
)
def test_sentencepiece_on_hard_strings(options: dict[str, Any]) -> None:
    for text in HARD:
        require_sentencepieces_ids(sentencepiece_model(**options), text)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_sentencepiece_on_any_string(text: str) -> None:
    require_sentencepieces_ids(sentencepiece_model(), text)


def test_special_tokens_in_text_are_recognized_as_by_hugging_face() -> None:
    assert made(sentencepiece_model()).encode("<s>a</s>").ids[:2] == [1, 1]
    assert made(sentencepiece_model()).encode("<s>a</s>").ids[-1] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 380}, "its model_type is 1, expected 2 (BPE)"),
        ({"normalization_rule_name": "nmt_nfkc"}, "its normalization ('nmt_nfkc') changes text"),
        ({"remove_extra_whitespaces": True}, "its normalization ('identity') changes text"),
    ],
)
def test_sentencepiece_models_that_are_not_like_llamas(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"not a tokenizer .*{re.escape(message)}"):
        loaded(tmp_path, sentencepiece_model(**options))


# --- tiktoken ----------------------------------------------------------------------------------------


def require_tiktokens_ids(text: str) -> None:
    theirs, ours = tiktoken_encoding(), made(tiktoken_model())
    expected = theirs.encode(text, allowed_special="all")
    assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)
    assert ours.encode(text).ids == [len(tiktoken_ranks()), *expected]
    assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
    ours.encode_special_tokens = True
    expected = theirs.encode(text, disallowed_special=())
    assert ours.encode(text, add_special_tokens=False).ids == expected, repr(text)


def test_tiktoken_on_hard_strings() -> None:
    for text in HARD:
        require_tiktokens_ids(text)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_tiktoken_on_any_string(text: str) -> None:
    require_tiktokens_ids(text)


def test_a_piece_in_the_vocabulary_is_one_token_even_without_merges() -> None:
    ranks = [bytes([i]) for i in range(256)] + [b" zebra"]
    content = b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks))
    assert made(content).encode("a zebra").ids == [257, ord("a"), 256]


def test_llama_3s_special_tokens() -> None:
    tokens = special_tokens()
    assert len(set(tokens)) == len(tokens) == 256
    ids = {token: 128000 + i for i, token in enumerate(tokens)}
    assert ids["<|end_of_text|>"] == 128001
    assert ids["<|finetune_right_pad_id|>"] == 128004
    assert ids["<|start_header_id|>"] == 128006
    assert ids["<|eot_id|>"] == 128009
    assert ids["<|reserved_special_token_247|>"] == 128255


def test_tokenizer_json_to_ranks() -> None:
    tokenizer = tiktoken_json(tiktoken_model())
    assert model_of(tokenizer) == tiktoken_model()
    for key, value in [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", {"type": "ByteLevel"}),
        ("added_tokens", tokenizer["added_tokens"][:-1]),
        ("model", tokenizer["model"] | {"merges": tokenizer["model"]["merges"][1:]}),
        ("model", tokenizer["model"] | {"ignore_merges": False}),
    ]:
        assert model_of(tokenizer | {key: value}) is None
    assert model_of(model_json(sentencepiece_model())) is None
    assert model_of({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "has rank 1 or repeats a token, expected a new one with rank 0"),
        (lambda lines: lines[:200], "56 bytes have no token, first 200"),
        (lambda lines: [*lines[:5], b"!!! 5", *lines[6:]], "line 6 is b'!!! 5', expected a token"),
        (lambda lines: [*lines[:5], b"A 5", *lines[6:]], "line 6 is b'A 5', expected base64"),
        (
            lambda lines: [*lines, lines[0]],
            "has rank 0 or repeats a token, expected a new one with rank 480",
        ),
    ],
)
def test_damaged_ranks(tmp_path: Path, change: Any, message: str) -> None:
    content = b"\n".join(change(tiktoken_model().splitlines()))
    with pytest.raises(ValueError, match=f"not a tokenizer .*{re.escape(message)}"):
        loaded(tmp_path, content)


# --- both --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_tokenizer_config_decides_bos_and_eos(
    tmp_path: Path, form: str, bos: bool | None, eos: bool | None
) -> None:
    content = FORMS[form]()
    base = len(tiktoken_ranks()) if form == "tiktoken" else 1
    options = {"add_bos_token": bos, "add_eos_token": eos}
    options = {key: value for key, value in options.items() if value is not None}
    ours = loaded(tmp_path, content, **options)
    before, after = [base] * (bos is not False), [base + 1] * bool(eos)
    plain = ours.encode("ab", add_special_tokens=False)
    encoding = ours.encode("ab")
    assert encoding.ids == before + plain.ids + after
    assert encoding.special_tokens_mask == [1] * len(before) + [0] * len(plain.ids) + [1] * len(
        after
    )
    assert ours.encode("ab", "ab").ids == encoding.ids * 2


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_a_tokenizer_json_follows_tokenizer_config_as_in_hugging_face(
    tmp_path: Path, bos: bool, eos: bool, template: bool
) -> None:
    content = model_json(tiktoken_model(), add_bos=template)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": {"content": "<|end_of_text|>", "__type": "AddedToken"},
        "add_bos_token": bos,
        "add_eos_token": eos,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in HARD:
        encoding, expected = ours.encode(text), theirs(text, return_special_tokens_mask=True)
        assert encoding.ids == expected.input_ids
        assert encoding.special_tokens_mask == expected.special_tokens_mask


@pytest.mark.parametrize("form", list(FORMS))
def test_hugging_face_reads_the_tokenizer_json(tmp_path: Path, form: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(model_json(FORMS[form]())))
    options = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in HARD:
        assert ours.encode(text).ids == theirs(text).input_ids


def test_tokenizer_json_takes_precedence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no matter")
    (tmp_path / "tokenizer.json").write_text(json.dumps(model_json(sentencepiece_model())))
    assert load_tokenizer(tmp_path).get_vocab_size() == 600


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x00" * 50, b"{}", b"\xff" * 9, b"\n\x03\n\x01a"]
)
def test_files_that_are_not_tokenizers(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a tokenizer \(.*\)$") as caught:
        loaded(tmp_path, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", list(FORMS))
def test_truncated_and_flipped_bytes(form: str) -> None:
    content = FORMS[form]()
    rng = random.Random(0)
    for trial in range(300):
        damaged = bytearray(content)
        if trial % 3:
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(content)) :]
        try:
            made(bytes(damaged))
        except ValueError as error:
            assert "\n" not in str(error)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: not found, expected a tokenizer"):
        load_tokenizer(tmp_path)
