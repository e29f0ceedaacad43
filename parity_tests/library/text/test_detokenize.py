"""Streamed text: complete characters, and no part of a stop string."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_jax.text.detokenize import TextStream, token_texts
from llama_jax.text.tokenizer import load_tokenizer
from parity_tests.harness.tiny_tokenizers import (
    sentencepiece_model,
    tiktoken_encoding,
    tiktoken_model,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One byte per token, so most characters take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def parts_of(tokenizer, text, stops=()):
    stream = TextStream(tokenizer, tokenizer.encode("so: é").ids, stops)
    parts = [stream.push(token) for token in tokenizer.encode(text).ids]
    return [*parts, stream.finish()], stream


texts = st.text(st.sampled_from("ab é🙂漢\n"), max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts)
def test_no_partial_characters(tokenizer, text):
    parts, _ = parts_of(tokenizer, text)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts, st.lists(st.text(st.sampled_from("ab é"), min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(tokenizer, text, stops):
    positions = [text.find(stop) for stop in stops if stop in text]
    parts, stream = parts_of(tokenizer, text, stops)
    assert stream.stopped == bool(positions)
    got = "".join(parts)
    assert not any(stop in got for stop in stops)
    assert text.startswith(got)
    if not positions:
        assert got == text


def test_a_partial_character_at_the_end_becomes_a_replacement_character(tokenizer):
    stream = TextStream(tokenizer, [])
    assert [stream.push(token) for token in tokenizer.encode("🙂").ids[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


# Stop strings that name special tokens ------------------------------------------------------------

END = "<|im_end|>"


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def with_special(request, tokenizer) -> Tokenizer:
    """Both have the special token END; the second one has pieces, and bytes for a line end and ไ."""
    if request.param == "bytes":
        made = Tokenizer.from_str(tokenizer.to_str())
    else:
        pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdone.", "▁the"]
        made = Tokenizer(models.Unigram([(p, -1.0) for p in dict.fromkeys(pieces)], 0, True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    made.add_special_tokens([END, "<|end|>"])
    return made


def until(tokenizer, text, stops, prompt="a"):
    """The text, and the number of tokens before it stopped."""
    stream, parts = TextStream(tokenizer, tokenizer.encode(prompt).ids, stops), []
    ids = tokenizer.encode(text).ids
    for count, token in enumerate(ids, 1):
        parts.append(stream.push(token))
        if stream.stopped:
            return "".join(parts), tokenizer.decode(ids[:count], skip_special_tokens=False)
    return "".join(parts) + stream.finish(), None


@pytest.mark.parametrize(
    ("text", "stops", "shown", "read"),
    [
        (f"done.{END}\nab", [END], "done.", f"done.{END}"),
        (f"{END}ab", [END], "", END),
        (f"ไ{END}ab", [END], "ไ", f"ไ{END}"),
        (f"ab cd{END} the", [f"d{END}"], "ab c", f"ab cd{END}"),
        (f"ab{END}\nab", [f"{END}\n"], "ab", f"ab{END}\n"),
        (f"ab{END} cd{END}\n", [f"{END}\n"], "ab cd", f"ab{END} cd{END}\n"),
        (f"ab{END}<|end|>cd", ["<|end|>", f"{END}<|end|>c"], "ab", f"ab{END}<|end|>"),
        (f"ab{END}<|end|>cd", [f"{END}<|end|>"], "ab", f"ab{END}<|end|>"),
        (f"ab{END}cd", ["im_end"], "ab", f"ab{END}"),
        (f"ab{END}cd", ["bc"], "a", f"ab{END}c"),  # in the text as it is shown
        (f"ab{END}cd{END}", ["cd", END], "ab", f"ab{END}"),
        (f"ab{END}cd", [f"{END}d"], "abcd", None),
        (f"ab cd{END}", ["the", "x"], "ab cd", None),
        ("ab\ncd", ["\n"], "ab", "ab\n"),
        ("ab\n\ncd", ["\n\n"], "ab", "ab\n\n"),
        ("abcd", ["bc", "abcd", "b"], "a", "ab"),
    ],
)
def test_a_stop_string_may_contain_special_tokens(with_special, text, stops, shown, read):
    assert until(with_special, text, stops) == (shown, read)


def test_stop_strings_in_the_prompt_are_ignored(with_special):
    assert until(with_special, f"ab{END}", [END], prompt=f"a{END}") == ("ab", f"ab{END}")
    assert until(with_special, "ab", [END, f"{END}a"], prompt=f"a{END}") == ("ab", None)


def test_a_stop_string_inside_a_token():
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "##ater": 1, "way": 2}))
    tokenizer.decoder = decoders.WordPiece()
    stream = TextStream(tokenizer, [0], ["at", "y"])
    assert [stream.push(0), stream.push(1), stream.stopped] == [" the", "", True]
    stream = TextStream(tokenizer, [0], ["y"])
    assert (stream.push(2), stream.stopped) == (" wa", True)


def test_a_stop_string_may_contain_the_token_that_ends_the_text(with_special):
    end = with_special.token_to_id(END)
    stream = TextStream(with_special, [], [f"b{END}"])
    parts = [stream.push(token) for token in with_special.encode("ab").ids]
    assert ["".join(parts), stream.finish(end), stream.stopped] == ["a", "", True]
    stream = TextStream(with_special, [], ["bc"])
    parts = [stream.push(token) for token in with_special.encode("ab").ids]
    assert ["".join(parts), stream.finish(end), stream.stopped] == ["a", "b", False]


def test_an_empty_stop_string(tokenizer):
    with pytest.raises(ValueError, match="stops: a stop string is empty"):
        TextStream(tokenizer, [], ["a", ""])


def test_the_texts_of_single_tokens_add_up_to_the_text(tmp_path):
    """With their spaces, and as bytes where a token is not a character."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    text = "the quick  brown ☃ fox"
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    pieces = SentencePieceProcessor(model_proto=sentencepiece_model()).encode(text, out_type=str)
    expected = [piece.replace("▁", " ") for piece in pieces]
    assert "<0xE2>" in expected
    assert token_texts(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids) == expected
    assert token_texts(tokenizer, [1]) == ["<s>"]

    (tmp_path / "tokenizer.model").write_bytes(tiktoken_model())
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    pieces = [
        tiktoken_encoding().decode_single_token_bytes(i) for i in tiktoken_encoding().encode(text)
    ]
    shown = token_texts(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    parts = [re.sub("<0x(..)>", lambda m: chr(int(m[1], 16)), text) for text in shown]
    assert [part.encode("latin-1") for part in parts] == pieces
    assert "<0xE2>" in "".join(shown)
