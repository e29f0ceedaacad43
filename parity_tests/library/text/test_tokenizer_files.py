"""Every layout of tokenizer files gives the ids of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llama_jax.text.chat_template import find_chat_template, render_chat
from llama_jax.text.tiktoken import special_tokens as metas_tokens
from llama_jax.text.tokenizer import load_tokenizer, model_json, special_tokens
from llama_jax.text.tokenizer_files import read_files
from parity_tests.harness.tiny_tokenizers import (
    sentencepiece_model,
    tiktoken_encoding,
    tiktoken_model,
)
from parity_tests.harness.tokenizer_layouts import (
    CHAT,
    DEFINED,
    LAYOUTS,
    byte_level,
    flags,
    hard_strings,
    slow_4_36,
    write_layout,
)


def require_transformers_tokenizer(directory: Path, count: int) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert ours.get_vocab() == theirs.get_vocab()
    assert special_tokens(read_files(directory)) == theirs.special_tokens_map
    for text in hard_strings(count):
        expected = theirs(text).input_ids
        assert ours.encode(text).ids == expected, repr(text)
        plain = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False).ids == plain, repr(text)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
        assert ours.decode(expected, skip_special_tokens=False) == theirs.decode(expected)
    if theirs.chat_template is None:
        return
    template, tokens = find_chat_template(directory)
    for text in hard_strings(min(count, 20)):
        messages = [{"role": "user", "content": text, "name": None}]
        rendered = theirs.apply_chat_template(messages, tokenize=False)
        text = render_chat(template, messages, add_generation_prompt=False, special_tokens=tokens)
        assert text == rendered
        if count < 1000:
            break  # each call starts a process


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout(tmp_path: Path, name: str) -> None:
    require_transformers_tokenizer(write_layout(tmp_path, LAYOUTS[name]), 150)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_on_many_strings(tmp_path: Path, name: str) -> None:
    require_transformers_tokenizer(write_layout(tmp_path, LAYOUTS[name]), 1000)


def test_truncation_padding_and_dropout_are_off(tmp_path: Path) -> None:
    content = LAYOUTS["truncation and padding"]["tokenizer.json"]
    content = content | {"model": content["model"] | {"dropout": 0.9}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    text = "the quick brown fox " * 5
    expected = tiktoken_encoding().encode(text)
    for _ in range(3):
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_a_class_that_transformers_5_rebuilds_differently(tmp_path: Path) -> None:
    """SmolLM's: as huggingface/tokenizers and transformers 4 read it, digits split from spaces.

    transformers 5 uses GPT-2's splitting instead of the file's.
    """
    content = model_json(tiktoken_model())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
    }
    ours = load_tokenizer(write_layout(tmp_path, files))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ["  7", "x = [1,    42]", "á ë 2024", *hard_strings(50)]:
        assert ours.encode(text).ids == theirs.encode(text).ids


# --- a tokenizer.model alone -------------------------------------------------------------------------


def test_sentencepieces_user_defined_pieces(tmp_path: Path) -> None:
    content = sentencepiece_model(**DEFINED)
    (tmp_path / "tokenizer.model").write_bytes(content)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = load_tokenizer(tmp_path)
    ours.encode_special_tokens = True
    for text in ["the<sep>other", " <sep>x", "a the   the", *hard_strings(300)]:
        if text not in (
            "<sep>",
            "the",
            "▁▁▁",
        ):  # nothing else: no space in front, see its docstring
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    tokens = ours.encode("the<sep>other", add_special_tokens=False).tokens
    assert tokens[-3:] == theirs.encode("the<sep>other", out_type=str)[-3:]
    assert "▁other" not in tokens


@pytest.mark.parametrize(
    ("beside", "place_4"),
    [
        ({"params.json": {"rope_theta": 500000.0}}, "<|reserved_special_token_2|>"),
        ({"params.json": {"use_scaled_rope": True}}, "<|finetune_right_pad_id|>"),
        ({"config.json": {"rope_scaling": None}}, "<|reserved_special_token_2|>"),
        (
            {"config.json": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}},
            "<|reserved_special_token_2|>",
        ),
        ({"config.json": {"rope_scaling": {"rope_type": "llama3"}}}, "<|finetune_right_pad_id|>"),
        ({}, "<|finetune_right_pad_id|>"),
    ],
)
def test_the_config_tells_llama_3_0_from_3_1(
    tmp_path: Path, beside: dict[str, Any], place_4: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_model())
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).id_to_token(480 + 4) == place_4


def test_special_tokens_of_llama_3_0() -> None:
    """As Meta's llama3/tokenizer.py lists them."""
    tokens = metas_tokens(release_3_0=True)
    expected = ["<|begin_of_text|>", "<|end_of_text|>"]
    expected += [f"<|reserved_special_token_{i}|>" for i in range(4)]
    expected += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>"]
    expected += ["<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]
    assert tokens == expected


def pieces_as_meta_cuts(text: str, most: int = 25_000) -> list[str]:
    """No piece has a run of more than so many characters with or without white space."""
    pieces, run = [""], 0
    for last, character in zip(" " + text, text, strict=False):
        goes_on = pieces != [""] and last.isspace() == character.isspace()
        run = run + 1 if goes_on else 1
        if run > most:
            pieces.append("")
            run = 1
        pieces[-1] += character
    return pieces


@pytest.mark.parametrize(
    "text",
    [" " * 30_000, "a" + " " * 25_000 + "b", "x " + "the" * 8_400, "\n" * 25_001 + " end", "hi"],
    ids=["spaces", "exactly", "letters", "lines", "short"],
)
def test_long_runs_are_cut_as_in_metas_code(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_model())
    ids = load_tokenizer(tmp_path).encode(text, add_special_tokens=False).ids
    encoding = tiktoken_encoding()
    assert ids == [i for piece in pieces_as_meta_cuts(text) for i in encoding.encode(piece)]


# --- chat templates and mistakes ---------------------------------------------------------------------


def test_special_tokens_map_reaches_the_chat_template(tmp_path: Path) -> None:
    files = byte_level(kind="PreTrainedTokenizerFast")
    files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files["special_tokens_map.json"] = {"bos_token": "<s>", "eos_token": flags("</s>")}
    write_layout(tmp_path, files)
    template, tokens = find_chat_template(tmp_path)
    shown = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat(shown, messages, special_tokens=tokens) == "<s>hi</s>"
    assert template == CHAT
    require_transformers_tokenizer(tmp_path, 20)


def test_named_templates(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "rag.jinja").write_text("r")
    with pytest.raises(ValueError, match="found chat templates 'rag', expected one called"):
        find_chat_template(tmp_path)
    (folder / "default.jinja").write_bytes(b"d\r\n")
    assert find_chat_template(tmp_path)[0] == "d\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "tokenizer_config.json: found a JSON list, expected an object"),
        ({"bos_token": 5}, "bos_token: found 5, expected a token's text"),
        ({"bos_token": {"content": 5}}, "bos_token: found"),
        ({"legacy": "no"}, "legacy: found 'no', expected true or false"),
        ({"tokenizer_class": ["a"]}, "tokenizer_class: found"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder: found [], expected tokens by id"),
        ({"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder: found 'x'"),
        ({"extra_special_tokens": "x"}, "extra_special_tokens: found 'x', expected a list"),
        ({"additional_special_tokens": [1]}, "additional_special_tokens: found 1"),
        ({"split_special_tokens": 1}, "split_special_tokens: found 1"),
    ],
)
def test_impossible_values(tmp_path: Path, change: Any, message: str) -> None:
    files = slow_4_36(DEFINED, added=False)
    if isinstance(change, dict):
        change = files["tokenizer_config.json"] | change
    write_layout(tmp_path, files | {"tokenizer_config.json": change})
    for read in (load_tokenizer, find_chat_template):
        with pytest.raises(ValueError) as caught:
            read(tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
