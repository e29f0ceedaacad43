"""The tokenizer in a token directory: its special tokens, its files, and whether it is the same."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from parity_tests.harness.tiny_tokenizers import sentencepiece_model
from parity_tests.train.corpus import (
    EOS,
    WORDS,
    documents_of,
    ids_of,
    word_tokenizer,
    write_lines,
)
from train.data.sources import common_vocabulary, require_same_tokenizer
from train.data.special_ids import SpecialIds, model_ids
from train.data.token_directory import TokenDirectory
from train.data.token_shards import open_tokens
from train.data.tokenize import tokenize


@pytest.mark.parametrize(
    ("files", "option", "expected"),
    [
        ({}, None, EOS),
        ({}, "b", "b"),
        ({"tokenizer_config.json": {"eos_token": "c"}}, None, "c"),
        ({"tokenizer_config.json": {"eos_token": {"content": "c"}}}, None, "c"),
        ({"tokenizer_config.json": {"eos_token": "c"}}, "d", "d"),
        ({"tokenizer_config.json": {"eos_token": None}}, None, EOS),
        ({"special_tokens_map.json": {"eos_token": "c"}, "config.json": {"eos_token_id": 3}}, None, "c"),
        ({"config.json": {"eos_token_id": WORDS.index("d")}}, None, "d"),
        ({"config.json": {"eos_token_id": [WORDS.index("e"), 1]}}, None, "e"),
        ({"generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 4}}, None, "c"),
    ],
)  # fmt: skip
def test_where_the_end_of_text_token_comes_from(
    files: dict[str, object], option: str | None, expected: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer = word_tokenizer(tmp_path / "tok")
    for name, content in files.items():
        (tokenizer / name).write_text(json.dumps(content))
    index = tokenize([source], tokenizer, tmp_path / "out", eos=option)
    assert index.eos_id == WORDS.index(expected)


@pytest.mark.parametrize(
    ("bos", "config", "expected"),
    [
        (False, {}, (None, EOS)),
        (True, {}, ("<s>", EOS)),
        (False, {"bos_token": "b"}, ("b", EOS)),
        (
            True,
            {"bos_token": {"__type": "AddedToken", "content": "b"}, "eos_token": "c"},
            ("b", "c"),
        ),
        (False, {"bos_token": None, "eos_token": "c"}, (None, "c")),
    ],
)
def test_special_ids_in_the_index_the_model_and_the_tokenizer_files(
    bos: bool, config: dict[str, object], expected: tuple[str | None, str], tmp_path: Path
) -> None:
    """Without a beginning token the model and the written files use the end token, as in GPT-2."""
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer = word_tokenizer(tmp_path / "tok", bos=bos, **config)
    index = tokenize([source], tokenizer, tmp_path / "out")
    begin, end = expected
    assert index.bos_id == (None if begin is None else WORDS.index(begin))
    assert index.eos_id == WORDS.index(end)
    ids = model_ids(SpecialIds(index.bos_id, index.eos_id))
    assert ids == {
        "bos_token_id": WORDS.index(begin or end),
        "eos_token_id": WORDS.index(end),
    }
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == (None if config and "eos_token" not in config else index.eos_id)
    if not config:
        assert theirs.bos_token_id == ids["bos_token_id"]
        assert theirs("a b")["input_ids"] == ids_of("<s> a b" if bos else "a b")


@pytest.mark.parametrize("config", [{}, {"eos_token": EOS, "pad_token": "d"}], ids=["map", "both"])
def test_the_end_token_named_by_eos_is_in_the_tokenizer_files(
    config: dict[str, str], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer = word_tokenizer(tmp_path / "tok", **config)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    index = tokenize([source], tokenizer, tmp_path / "out", eos="c")
    assert index.eos_id == WORDS.index("c")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "c"
    names = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert names == {"eos_token": "c"}


def test_all_tokenizer_files_are_copied(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer = word_tokenizer(tmp_path / "tok", eos_token=EOS)
    contents = {
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
        "chat_template.jinja": "{{ messages }}",
        "chat_template.json": '{"chat_template": ""}',
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "tokenizer.model": "as it is",
    }
    for name, content in contents.items():
        (tokenizer / name).parent.mkdir(exist_ok=True)
        (tokenizer / name).write_text(content)
    index = tokenize([source], tokenizer, tmp_path / "out")
    assert set(index.tokenizer) == {*contents, "tokenizer.json", "tokenizer_config.json"}
    for name, content in contents.items():
        assert (tmp_path / "out" / name).read_text() == content


@pytest.mark.parametrize("named", ["directory", "file"])
def test_a_tokenizer_model_alone(named: str, tmp_path: Path) -> None:
    """The ids are those of SentencePiece, and the directory has what other programs need."""
    texts = ["The quick brown fox", "Größe 12"]
    source = write_lines(tmp_path / "a.jsonl", texts)
    model = tmp_path / "tok" / "tokenizer.model"
    model.parent.mkdir()
    model.write_bytes(sentencepiece_model())
    tokenizer = model if named == "file" else model.parent
    out = tmp_path / "out"
    index = tokenize([source], tokenizer, out, validation_fraction=0)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert (index.bos_id, index.eos_id) == (theirs.bos_id(), theirs.eos_id())
    assert documents_of(open_tokens(out, "train")) == [
        [theirs.bos_id(), *theirs.encode(text), theirs.eos_id()] for text in texts
    ]
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= {*index.tokenizer}
    assert (out / "tokenizer.model").read_bytes() == sentencepiece_model()
    require_same_tokenizer(model.parent, out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(texts[0])["input_ids"] == [theirs.bos_id(), *theirs.encode(texts[0])]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (index.bos_id, index.eos_id)


def bpe_tokenizer(directory: Path, merges: Sequence[tuple[str, str]], **parts: object) -> Path:
    """The same vocabulary with any merges; `parts`: attributes of the `tokenizers.Tokenizer`."""
    words = ["<unk>", EOS, "a", "b", "c", "ab", "bc", "abc"]
    model = models.BPE({word: i for i, word in enumerate(words)}, list(merges), unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([EOS])
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


AB_BC = [("a", "b"), ("b", "c"), ("ab", "c")]


OTHER_TOKENIZERS: dict[str, dict[str, Any]] = {
    "merges": {"merges": [("b", "c"), ("a", "b"), ("a", "bc")]},
    "normalizer": {"merges": AB_BC, "normalizer": normalizers.Lowercase()},
    "pre-tokenizer": {"merges": AB_BC, "pre_tokenizer": pre_tokenizers.Split("b", "isolated")},
    "post-processor": {
        "merges": AB_BC,
        "post_processor": processors.TemplateProcessing("a $A", special_tokens=[("a", 2)]),
    },
}


@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_different_tokenizers_with_one_vocabulary_are_noticed(kind: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path / "tok", AB_BC)
    other = bpe_tokenizer(tmp_path / "other", **OTHER_TOKENIZERS[kind])
    vocabularies = [
        Tokenizer.from_file(f"{directory}/tokenizer.json").get_vocab()
        for directory in (tokenizer, other)
    ]
    assert vocabularies[0] == vocabularies[1]
    source = write_lines(tmp_path / "a.jsonl", ["abcab", "ABC"])
    out = tmp_path / "out"
    tokenize([source], tokenizer, out, validation_fraction=0)
    require_same_tokenizer(tokenizer, out)
    with pytest.raises(ValueError) as caught:
        require_same_tokenizer(other, out)
    message = (
        r"found a tokenizer with digest [0-9a-f]{12}, expected [0-9a-f]{12}, that of .*/other: "
    )
    assert re.search(message + "tokenize the text with it", str(caught.value))
    tokenize([source], other, tmp_path / "out2", validation_fraction=0)
    sources = [TokenDirectory(out), TokenDirectory(tmp_path / "out2")]
    with pytest.raises(ValueError, match=message.replace("/other", "/out")):
        common_vocabulary(sources)
    with pytest.raises(ValueError, match=r"made with tokenizer '[0-9a-f]{16}', not "):
        tokenize([source], other, out, validation_fraction=0)


def test_the_same_tokenizer_in_another_file(tmp_path: Path) -> None:
    """Spaces, truncation and padding do not make another tokenizer."""
    tokenizer = bpe_tokenizer(tmp_path / "tok", AB_BC)
    other = bpe_tokenizer(tmp_path / "other", AB_BC)
    cut = Tokenizer.from_file(f"{other}/tokenizer.json")
    cut.enable_truncation(8)
    cut.enable_padding(length=20)
    (other / "tokenizer.json").write_text(json.dumps(json.loads(cut.to_str()), indent=1))
    require_same_tokenizer(tokenizer, other)
