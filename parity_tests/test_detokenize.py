"""Text as it comes: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_jax.detokenize import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, one a token: most characters take several."""
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
def test_never_half_a_character(tokenizer, text):
    parts, _ = parts_of(tokenizer, text)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts, st.lists(st.text(st.sampled_from("ab é"), min_size=1, max_size=3), max_size=3))
def test_ends_before_the_first_stop_string(tokenizer, text, stops):
    found = [text.find(stop) for stop in stops if stop in text]
    parts, stream = parts_of(tokenizer, text, stops)
    assert stream.stopped == bool(found)
    got = "".join(parts)
    assert not any(stop in got for stop in stops)
    assert text.startswith(got)
    if not found:
        assert got == text


def test_half_a_character_at_the_very_end_is_shown(tokenizer):
    stream = TextStream(tokenizer, [])
    assert [stream.push(token) for token in tokenizer.encode("🙂").ids[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
