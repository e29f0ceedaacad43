"""Tokenizing: the documents of a token directory, their split and their shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from parity_tests.train.corpus import (
    EOS,
    WORDS,
    documents_of,
    files_of,
    ids_of,
    random_texts,
    word_tokenizer,
    write_lines,
)
from train.data.token_directory import TokenDirectory
from train.data.token_shards import open_tokens, read_index
from train.data.tokenize import tokenize


def test_documents_end_with_eos_and_the_tokenizer_is_copied(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a b", "c", "", "  "])
    directory = word_tokenizer(tmp_path / "tok", eos_token=EOS, pad_token="h")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README").write_text("not part of the tokenizer")
    index = tokenize([source], directory, tmp_path / "out", validation_fraction=0)
    assert index == read_index(tmp_path / "out")
    assert (index.complete, index.eos_id, index.bos_id) == (True, WORDS.index(EOS), None)
    assert (index.dtype, index.vocab_size) == ("uint16", len(WORDS))
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [
        ids_of(f"a b {EOS}"), ids_of(f"c {EOS}"), ids_of(EOS),
    ]  # fmt: skip
    assert index.tokenizer == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in index.tokenizer:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    assert len(files_of(tmp_path / "out")) == 6


def test_the_beginning_token_that_the_tokenizer_adds(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    tokenizer = word_tokenizer(tmp_path / "tok", bos=True)
    tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [ids_of(f"<s> a {EOS}"), ids_of(f"<s> b {EOS}")]


@pytest.mark.parametrize("bos", [False, True])
def test_without_an_end_token_documents_begin_with_the_beginning_token(
    bos: bool, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a", "b b"])
    tokenizer = word_tokenizer(tmp_path / "tok", ["<s>", "<unk>", "a", "b"], bos=bos)
    index = tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0)
    assert (index.eos_id, index.bos_id) == (None, 0)
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [[0, 2], [0, 3, 3]]


def test_special_tokens_in_the_text_are_encoded_as_text(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [f"a {EOS} b{EOS}"])
    directory = word_tokenizer(tmp_path / "tok", ["<unk>", "a", "b"])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([EOS])  # not in the model's vocabulary
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenize([source], directory, tmp_path / "out", validation_fraction=0)
    assert tokenizer.encode(f"a {EOS} b{EOS}").ids == [1, 3, 2, 3]
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [[1, 0, 0, 3]]


def test_truncation_and_padding_of_the_tokenizer_are_ignored(tmp_path: Path) -> None:
    directory = word_tokenizer(tmp_path / "tok")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(directory / "tokenizer.json"))
    source = write_lines(tmp_path / "a.jsonl", ["a b c d e f g h", "a"])
    tokenize([source], directory, tmp_path / "out", validation_fraction=0)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [ids_of(f"a b c d e f g h {EOS}"), ids_of(f"a {EOS}")]


def test_a_large_vocabulary(tmp_path: Path) -> None:
    words = [EOS, "<unk>", *(f"w{n}" for n in range(69_998))]
    source = write_lines(tmp_path / "a.jsonl", ["w0 w69997", "w65534"])
    tokenizer = word_tokenizer(tmp_path / "tok", words)
    index = tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0)
    assert (index.dtype, index.vocab_size) == ("uint32", 70_000)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [[2, 69_999, 0], [65_536, 0]]


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = random_texts(400)
    texts += texts[:50]  # duplicates
    tokenizer = word_tokenizer(tmp_path / "tok")

    def split(name: str, order: list[str]) -> dict[str, Counter[tuple[int, ...]]]:
        source = write_lines(tmp_path / f"{name}.jsonl", order)
        tokenize([source], tokenizer, tmp_path / name, validation_fraction=0.25, shard_tokens=500)
        return {
            part: Counter(map(tuple, documents_of(open_tokens(tmp_path / name, part))))
            for part in ("train", "validation")
        }

    splits = split("a", texts)
    assert split("b", texts[::-1]) == splits
    assert splits["train"] + splits["validation"] == Counter(
        tuple(ids_of(f"{text} {EOS}")) for text in texts
    )
    assert not splits["train"].keys() & splits["validation"].keys()
    assert 70 <= splits["validation"].total() <= 160


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tok")
    # 3 tokens each, so that two fill a shard of 6; then one that is longer than a shard
    source = write_lines(tmp_path / "a.jsonl", ["a b"] * 4 + ["c " * 20, "d"])
    index = tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0, shard_tokens=6)
    assert [(s.tokens, s.documents) for s in index.splits["train"]] == [
        (6, 2), (6, 2), (21, 1), (2, 1),
    ]  # fmt: skip
    source = write_lines(tmp_path / "b.jsonl", ["a b"] * 4)
    index = tokenize([source], tokenizer, tmp_path / "exact", validation_fraction=0, shard_tokens=6)
    assert [s.tokens for s in index.splits["train"]] == [6, 6]
    assert not index.splits["validation"]


def test_documents_are_in_the_order_of_sources_and_names(tmp_path: Path) -> None:
    for name, text in (("x/b.txt", "b"), ("x/a.txt", "a"), ("c.txt", "c\r\nd")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, newline="")
    tokenizer = word_tokenizer(tmp_path / "tok")
    sources = [tmp_path / "c.txt", tmp_path / "x"]
    tokenize(sources, tokenizer / "tokenizer.json", tmp_path / "out", validation_fraction=0)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [ids_of(f"c d {EOS}"), ids_of(f"a {EOS}"), ids_of(f"b {EOS}")]


@pytest.mark.parametrize(
    ("texts", "fraction", "split"),
    [
        (["a"], 0.5, None),
        (["a", "b"], 1e-9, "validation"),
        (["a", "b", "c", "d"], 1 - 1e-12, "train"),
    ],
)
def test_a_note_on_an_empty_split_says_which_fraction_fills_it(
    texts: list[str], fraction: float, split: str | None, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    tokenizer, lines = word_tokenizer(tmp_path / "tok"), []
    tokenize([source], tokenizer, tmp_path / "out", validation_fraction=fraction, note=lines.append)
    (line,) = lines
    if split is None:
        assert line.endswith("; a single document cannot be divided: tokenize more of them")
        return
    assert line.startswith(f"the {split} split is empty")
    assert ("--evaluation.every 0" in line) == (split == "validation")
    suggested = float(line.split("--validation-fraction ")[1].split()[0])
    if split == "validation":
        # again when the command is repeated, and by the run that would evaluate
        tokenize(
            [source], tokenizer, tmp_path / "out", validation_fraction=fraction, note=lines.append
        )
        assert lines.pop() == line
        with pytest.raises(ValueError) as caught:
            TokenDirectory(tmp_path / "out").require_validation()
        assert str(caught.value) == (
            f"{tmp_path}/out: the validation split is empty: run with --evaluation.every 0, or tokenize "
            f"with --validation-fraction {suggested} to fill it"
        )
    tokenize(
        [source], tokenizer, tmp_path / "again", validation_fraction=suggested, note=lines.append
    )
    assert lines == [line]
    tokenize([source], tokenizer, tmp_path / "none", validation_fraction=0, note=lines.append)
    assert lines == [line]  # no validation split was requested


def test_wrong_arguments(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer, out = word_tokenizer(tmp_path / "tok"), tmp_path / "out"

    def error_of(
        sources: Sequence[Path] = (source,), tokenizer: Path = tokenizer, **options: object
    ) -> str:
        with pytest.raises(ValueError) as caught:
            tokenize(sources, tokenizer, options.pop("out", out), **options)
        assert not out.exists()
        return str(caught.value)

    assert error_of([]) == "sources: give at least one file, directory or glob"
    assert error_of([tmp_path / "x"]) == f"{tmp_path}/x: no such file"
    for fraction in (-0.1, 1, float("nan")):
        assert error_of(validation_fraction=fraction) == (
            f"validation_fraction: found {fraction}, expected 0 <= it < 1"
        )
    assert error_of(shard_tokens=0) == "shard_tokens: found 0, expected at least 1"
    assert error_of(tokenizer=tmp_path) == (
        f"{tmp_path}/tokenizer.json: not found, expected a tokenizer"
    )
    assert error_of(tokenizer=source).startswith(f"{source}: not a tokenizer (")
    assert error_of(eos="<end>") == "--eos: found '<end>', expected a token of the tokenizer"
    bare = word_tokenizer(tmp_path / "bare", ["<unk>", "a"])
    assert error_of(tokenizer=bare) == (
        f"{bare}: no file names the end-of-text token, and the vocabulary has none of the common ones; "
        "name it with --eos"
    )
    (tokenizer / "config.json").write_text("[]")
    message = error_of()
    assert message.startswith(f"{tokenizer}/config.json: found a JSON list, expected an object")
    (tokenizer / "config.json").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes").write_text("mine")
    assert error_of(out=other) == (
        f"{other}: is not empty and not a token directory; choose another --out"
    )
    assert error_of(out=source) == f"{source}: is a file, expected a directory"
