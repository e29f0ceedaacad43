"""Tokenizing: what is in the files, what divides the splits, and that no kill costs more than a shard."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from parity_tests.harness.child_process import ROOT
from parity_tests.harness.tiny_tokenizers import sentencepiece_model
from parity_tests.train.corpus import EOS, WORDS, as_version_1, word_tokenizer
from train.data.sources import common_index, require_same_tokenizer
from train.data.special_ids import SpecialIds, model_ids
from train.data.token_shards import (
    Tokens,
    document_ends,
    open_tokens,
    read_index,
    read_tokens,
    write_index,
)
from train.data.tokenize import tokenize


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(tokens: Tokens) -> list[list[int]]:
    row = read_tokens(tokens, 0, len(tokens), 1 << 31)
    return [part.tolist() for part in np.split(row, document_ends(tokens, 0, len(tokens))[:-1])]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 30))) for _ in range(count)]


def test_documents_end_with_eos_and_the_tokenizer_is_copied(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a b", "c", "", "  "])
    directory = word_tokenizer(tmp_path / "tok", eos_token=EOS, pad_token="h")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README").write_text("no part of it")
    index = tokenize([source], directory, tmp_path / "out", validation_fraction=0)
    assert index == read_index(tmp_path / "out")
    assert (index.complete, index.eos_id, index.bos_id) == (True, WORDS.index(EOS), None)
    assert (index.dtype, index.vocab_size) == ("uint16", len(WORDS))
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [
        ids(f"a b {EOS}"), ids(f"c {EOS}"), ids(EOS),
    ]  # fmt: skip
    assert index.tokenizer == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in index.tokenizer:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    assert len(files_of(tmp_path / "out")) == 6


def test_a_beginning_token_as_the_tokenizer_adds_it(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    tokenizer = word_tokenizer(tmp_path / "tok", bos=True)
    tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [ids(f"<s> a {EOS}"), ids(f"<s> b {EOS}")]


@pytest.mark.parametrize("bos", [False, True])
def test_a_tokenizer_without_an_end_begins_its_documents(bos: bool, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a", "b b"])
    tokenizer = word_tokenizer(tmp_path / "tok", ["<s>", "<unk>", "a", "b"], bos=bos)
    index = tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0)
    assert (index.eos_id, index.bos_id) == (None, 0)
    assert documents_of(open_tokens(tmp_path / "out", "train")) == [[0, 2], [0, 3, 3]]


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [f"a {EOS} b{EOS}"])
    directory = word_tokenizer(tmp_path / "tok", ["<unk>", "a", "b"])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([EOS])  # no word of the model
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
    assert documents == [ids(f"a b c d e f g h {EOS}"), ids(f"a {EOS}")]


def test_a_large_vocabulary(tmp_path: Path) -> None:
    words = [EOS, "<unk>", *(f"w{n}" for n in range(69_998))]
    source = write_lines(tmp_path / "a.jsonl", ["w0 w69997", "w65534"])
    tokenizer = word_tokenizer(tmp_path / "tok", words)
    index = tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0)
    assert (index.dtype, index.vocab_size) == ("uint32", 70_000)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [[2, 69_999, 0], [65_536, 0]]


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
def test_where_the_end_of_text_token_is_found(
    files: dict[str, object], option: str | None, expected: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer = word_tokenizer(tmp_path / "tok")
    for name, content in files.items():
        (tokenizer / name).write_text(json.dumps(content))
    index = tokenize([source], tokenizer, tmp_path / "out", eos=option)
    assert index.eos_id == WORDS.index(expected)


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = random_texts(400)
    texts += texts[:50]  # told apart by nothing
    tokenizer = word_tokenizer(tmp_path / "tok")

    def split(name: str, order: list[str]) -> dict[str, Counter[tuple[int, ...]]]:
        source = write_lines(tmp_path / f"{name}.jsonl", order)
        tokenize([source], tokenizer, tmp_path / name, validation_fraction=0.25, shard_tokens=500)
        return {
            part: Counter(map(tuple, documents_of(open_tokens(tmp_path / name, part))))
            for part in ("train", "validation")
        }

    found = split("a", texts)
    assert split("b", texts[::-1]) == found
    assert found["train"] + found["validation"] == Counter(
        tuple(ids(f"{text} {EOS}")) for text in texts
    )
    assert not found["train"].keys() & found["validation"].keys()
    assert 70 <= found["validation"].total() <= 160


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tok")
    # 3 tokens each, so that 6 are filled exactly; then one that is longer than a shard
    source = write_lines(tmp_path / "a.jsonl", ["a b"] * 4 + ["c " * 20, "d"])
    index = tokenize([source], tokenizer, tmp_path / "out", validation_fraction=0, shard_tokens=6)
    assert [(s.tokens, s.documents) for s in index.splits["train"]] == [
        (6, 2), (6, 2), (21, 1), (2, 1),
    ]  # fmt: skip
    source = write_lines(tmp_path / "b.jsonl", ["a b"] * 4)
    index = tokenize([source], tokenizer, tmp_path / "exact", validation_fraction=0, shard_tokens=6)
    assert [s.tokens for s in index.splits["train"]] == [6, 6]
    assert not index.splits["validation"]


def test_order_is_that_of_the_sources_and_names(tmp_path: Path) -> None:
    for name, text in (("x/b.txt", "b"), ("x/a.txt", "a"), ("c.txt", "c\r\nd")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, newline="")
    tokenizer = word_tokenizer(tmp_path / "tok")
    sources = [tmp_path / "c.txt", tmp_path / "x"]
    tokenize(sources, tokenizer / "tokenizer.json", tmp_path / "out", validation_fraction=0)
    documents = documents_of(open_tokens(tmp_path / "out", "train"))
    assert documents == [ids(f"c d {EOS}"), ids(f"a {EOS}"), ids(f"b {EOS}")]


# Forks before anything has started a thread; each child is killed at some moment, the last is not.
KILLER = """
import os, random, signal, sys, time
from train.data import token_shards, tokenize
source, tokenizer, out, plain = sys.argv[1:]

def child(directory, prepare):
    pid = os.fork()
    if pid:
        return pid
    prepare()
    tokenize.tokenize([source], tokenizer, directory, validation_fraction=0.3, shard_tokens=300)
    os._exit(0)

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(function, count, before):
    # at the count-th rename or synchronised write, before or after it is done
    real = getattr(os, function)
    def counting(*arguments):
        nonlocal count
        count -= 1
        if count < 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, function, counting)

assert status(child(plain, lambda: None)) == 0
killed = 0
for count in range(12):
    for function in ("replace", "fsync"):
        for before in (True, False):
            code = status(child(out, lambda: die_at(function, count, before)))
            killed += code == -signal.SIGKILL
print("killed", killed)

generator = random.Random(0)
for _ in range(20):
    pid = child(out + "-later", lambda: None)
    time.sleep(generator.random() * 0.03)
    os.kill(pid, signal.SIGKILL)
    status(pid)
assert status(child(out, lambda: None)) == 0
assert status(child(out + "-later", lambda: None)) == 0
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", random_texts(800))
    out, plain = tmp_path / "out", tmp_path / "plain"
    arguments = [source, word_tokenizer(tmp_path / "tok"), out, plain]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 16
    expected = files_of(plain)
    assert len(expected) > 40
    assert files_of(out) == expected
    assert files_of(tmp_path / "out-later") == expected


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", random_texts(300))
    tokenizer = word_tokenizer(tmp_path / "tok")
    out = tmp_path / "out"

    def run() -> list[tuple[int, int]]:
        reports: list[tuple[int, int]] = []
        tokenize(
            [source], tokenizer, out, validation_fraction=0.2, shard_tokens=400,
            report=lambda read, tokens: reports.append((read, tokens)),
        )  # fmt: skip
        return reports

    reports = run()
    expected = files_of(out)
    total = sum(s.tokens for shards in read_index(out).splits.values() for s in shards)
    assert reports[-1] == (source.stat().st_size, total)
    index = read_index(out)
    assert run() == []  # complete
    # as a kill after the third training shard would have left it
    kept = {**asdict(index), "complete": False}
    del index.splits["train"][3:], index.splits["validation"][:]
    write_index(out, type(index)(**{**kept, "splits": index.splits}))
    times = {name: (out / name).stat().st_mtime_ns for name in expected}
    assert run()[-1] == reports[-1]
    assert files_of(out) == expected
    again = {name for name in expected if (out / name).stat().st_mtime_ns != times[name]}
    assert not again & {f"train-0000{n}.{kind}" for n in range(3) for kind in ("tokens", "ends")}
    assert "train-00003.tokens" in again


@pytest.mark.parametrize("complete", [True, False])
def test_other_arguments_are_refused(complete: bool, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    other = write_lines(tmp_path / "b.jsonl", ["a", "b"])
    tokenizer, out = word_tokenizer(tmp_path / "tok"), tmp_path / "out"
    tokenizer_2 = word_tokenizer(tmp_path / "tok2", [*WORDS, "more"])
    index = tokenize([source], tokenizer, out)
    if not complete:
        write_index(out, type(index)(**{**asdict(index), "complete": False}))
    before = files_of(out)

    def error_of(source: Path, tokenizer: Path, **options: object) -> str:
        with pytest.raises(ValueError) as caught:
            tokenize([source], tokenizer, out, **options)
        assert "\n" not in str(caught.value)
        assert files_of(out) == before
        return str(caught.value)

    last = "remove it, choose another --out, or go on with the same arguments"
    assert error_of(source, tokenizer, validation_fraction=0.1) == (
        f"{out}: found a directory made with validation_fraction 0.005, expected 0.1: {last}"
    )
    assert error_of(source, tokenizer, shard_tokens=7).endswith(
        f"shard_tokens 33554432, expected 7: {last}"
    )
    assert error_of(source, tokenizer, eos="a").endswith(f"boundary_id 1, expected 3: {last}")
    assert error_of(source, tokenizer, text_field="t").endswith(
        f"text_field 'text', expected 't': {last}"
    )
    assert " made with sources " in error_of(other, tokenizer)
    assert " made with tokenizer " in error_of(source, tokenizer_2)


def test_mistakes(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer, out = word_tokenizer(tmp_path / "tok"), tmp_path / "out"

    def error_of(
        sources: Sequence[Path] = (source,), tokenizer: Path = tokenizer, **options: object
    ) -> str:
        with pytest.raises(ValueError) as caught:
            tokenize(sources, tokenizer, options.pop("out", out), **options)
        assert not out.exists()
        return str(caught.value)

    assert error_of([]) == "sources: found none, expected files, directories or globs"
    assert error_of([tmp_path / "x"]) == (
        f"{tmp_path}/x: found nothing, expected a file or a glob of files"
    )
    for fraction in (-0.1, 1, float("nan")):
        assert error_of(validation_fraction=fraction) == (
            f"validation_fraction: found {fraction}, expected 0 <= it < 1"
        )
    assert error_of(shard_tokens=0) == "shard_tokens: found 0, expected at least 1"
    assert error_of(tokenizer=tmp_path) == (
        f"{tmp_path}/tokenizer.json: not found, expected the checkpoint's tokenizer"
    )
    assert error_of(tokenizer=source).startswith(f"{source}: not a tokenizer (")
    assert error_of(eos="<end>") == "--eos: found '<end>', expected a token of the tokenizer"
    bare = word_tokenizer(tmp_path / "bare", ["<unk>", "a"])
    assert error_of(tokenizer=bare) == (
        f"{bare}: found no end-of-text token beside the tokenizer nor a common one in it, expected --eos"
    )
    (tokenizer / "config.json").write_text("[]")
    message = error_of()
    assert message.startswith(f"{tokenizer}/config.json: found a JSON list, expected an object")
    (tokenizer / "config.json").unlink()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes").write_text("mine")
    for there in (foreign, source):
        assert error_of(out=there) == (
            f"{there}: found something else, expected it absent or an empty directory"
        )


def test_a_fault_in_the_middle_keeps_what_is_done(tmp_path: Path) -> None:
    texts = random_texts(200)
    source = write_lines(tmp_path / "a.jsonl", texts)
    with source.open("a") as file:
        file.write("{\n")
    tokenizer, out = word_tokenizer(tmp_path / "tok"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 201: found no JSON"):
        tokenize([source], tokenizer, out, shard_tokens=200)
    with pytest.raises(ValueError, match="found an unfinished directory"):
        open_tokens(out, "train")


def bpe_tokenizer(directory: Path, merges: Sequence[tuple[str, str]], **more: object) -> Path:
    """One vocabulary, whatever the merges; `more`: parts of a `tokenizers.Tokenizer`."""
    words = ["<unk>", EOS, "a", "b", "c", "ab", "bc", "abc"]
    model = models.BPE({word: i for i, word in enumerate(words)}, list(merges), unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([EOS])
    for name, value in more.items():
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
def test_tokenizers_of_one_vocabulary_are_told_apart(kind: str, tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path / "tok", AB_BC)
    other = bpe_tokenizer(tmp_path / "other", **OTHER_TOKENIZERS[kind])
    vocabularies = [
        Tokenizer.from_file(f"{each}/tokenizer.json").get_vocab() for each in (tokenizer, other)
    ]
    assert vocabularies[0] == vocabularies[1]
    source = write_lines(tmp_path / "a.jsonl", ["abcab", "ABC"])
    out = tmp_path / "out"
    tokenize([source], tokenizer, out, validation_fraction=0)
    require_same_tokenizer(tokenizer, out)
    with pytest.raises(ValueError) as caught:
        require_same_tokenizer(other, out)
    told = r"found a tokenizer with digest [0-9a-f]{12}, expected [0-9a-f]{12}, that of .*/other: "
    assert re.search(told + "tokenize the text with it", str(caught.value))
    tokenize([source], other, tmp_path / "out2", validation_fraction=0)
    sources = [(out, 1.0), (tmp_path / "out2", 1.0)]
    with pytest.raises(ValueError, match=told.replace("/other", "/out")):
        common_index(sources)
    with pytest.raises(ValueError, match=r"made with tokenizer '[0-9a-f]{16}', expected "):
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


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_source_edited_to_the_same_size_is_refused(
    complete: bool, ending: str, tmp_path: Path
) -> None:
    source = tmp_path / f"a.jsonl{ending}"
    pack = (lambda data: gzip.compress(data, 0, mtime=0)) if ending else bytes
    texts = random_texts(40)
    source.write_bytes(pack(write_lines(tmp_path / "b", texts).read_bytes()))
    tokenizer, out = word_tokenizer(tmp_path / "tok"), tmp_path / "out"
    index = tokenize([source], tokenizer, out, validation_fraction=0, shard_tokens=100)
    if not complete:
        write_index(out, replace(index, complete=False))
    before, size = files_of(out), source.stat().st_size
    swapped = [texts[1], texts[0], *texts[2:]]
    source.write_bytes(pack(write_lines(tmp_path / "b", swapped).read_bytes()))
    assert source.stat().st_size == size
    with pytest.raises(
        ValueError, match=r"made with sources '[0-9a-f]{16}', expected '[0-9a-f]{16}': "
    ):
        tokenize([source], tokenizer, out, validation_fraction=0, shard_tokens=100)
    assert files_of(out) == before


def test_an_index_of_version_1(tmp_path: Path) -> None:
    """It is read, and an unfinished directory goes on by the rules it was begun with."""
    source = write_lines(tmp_path / "a.jsonl", random_texts(60))
    tokenizer, out = word_tokenizer(tmp_path / "tok", bos=True, eos_token=EOS), tmp_path / "out"
    index = tokenize([source], tokenizer, out, validation_fraction=0, shard_tokens=200)
    names = f"a.jsonl\0{source.stat().st_size}\0".encode()
    digests = {
        "sources": hashlib.sha256(names).hexdigest()[:16],
        "tokenizer": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()[:16],
    }
    shards = index.splits["train"]
    old = replace(index, complete=False, made_from=index.made_from | digests)
    write_index(out, replace(old, splits={"train": shards[:2], "validation": []}))
    as_version_1(out)
    assert read_index(out).bos_id is None
    again = tokenize([source], tokenizer, out, validation_fraction=0, shard_tokens=200)
    assert again.complete
    assert again.splits["train"][2:] == shards[2:]
    assert [s.sha256 for s in read_index(out).splits["train"][:2]] == [None, None]
    # the beginning token, which version 1 did not say, is found again
    assert common_index([(out, 1.0)]).bos_id == WORDS.index("<s>")


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
def test_the_index_has_both_ends_and_other_programs_too(
    bos: bool, config: dict[str, object], expected: tuple[str | None, str], tmp_path: Path
) -> None:
    """Without a beginning token it is the end's, as in GPT-2, for the model and in what is written."""
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
        assert theirs("a b")["input_ids"] == ids_of_text(bos)


def ids_of_text(bos: bool) -> list[int]:
    return ids("<s> a b" if bos else "a b")


@pytest.mark.parametrize("config", [{}, {"eos_token": EOS, "pad_token": "d"}], ids=["map", "both"])
def test_a_named_end_is_in_the_tokenizers_files(config: dict[str, str], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a"])
    tokenizer = word_tokenizer(tmp_path / "tok", **config)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    index = tokenize([source], tokenizer, tmp_path / "out", eos="c")
    assert index.eos_id == WORDS.index("c")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "c"
    named = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert named == {"eos_token": "c"}


def test_every_companion_is_kept(tmp_path: Path) -> None:
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
    """The ids are SentencePiece's, and the directory has what other programs need."""
    texts = ["The quick brown fox", "Größe 12"]
    source = write_lines(tmp_path / "a.jsonl", texts)
    model = tmp_path / "tok" / "tokenizer.model"
    model.parent.mkdir()
    model.write_bytes(sentencepiece_model())
    given = model if named == "file" else model.parent
    out = tmp_path / "out"
    index = tokenize([source], given, out, validation_fraction=0)
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


@pytest.mark.parametrize(
    ("texts", "fraction", "split"),
    [
        (["a"], 0.5, None),
        (["a", "b"], 1e-9, "validation"),
        (["a", "b", "c", "d"], 1 - 1e-12, "train"),
    ],
)
def test_an_empty_split_is_told_with_the_fraction_that_fills_it(
    texts: list[str], fraction: float, split: str | None, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    tokenizer, lines = word_tokenizer(tmp_path / "tok"), []
    tokenize([source], tokenizer, tmp_path / "out", validation_fraction=fraction, note=lines.append)
    (line,) = lines
    if split is None:
        assert line.endswith("; one document cannot be divided: tokenize more of them")
        return
    assert line.startswith(f"{split}: found no document, expected at least one")
    assert ("--evaluation.every 0" in line) == (split == "validation")
    suggested = float(line.split("--validation-fraction ")[1].split()[0])
    tokenize(
        [source], tokenizer, tmp_path / "again", validation_fraction=suggested, note=lines.append
    )
    assert lines == [line]
    tokenize([source], tokenizer, tmp_path / "none", validation_fraction=0, note=lines.append)
    assert lines == [line]  # none was wanted
