"""Tokenizing again: interrupted at any moment, with the same arguments or with others."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from parity_tests.harness.child_process import ROOT
from parity_tests.train.corpus import (
    EOS,
    WORDS,
    as_version_1,
    files_of,
    random_texts,
    word_tokenizer,
    write_lines,
)
from train.data.sources import common_vocabulary
from train.data.token_directory import TokenDirectory
from train.data.token_shards import open_tokens, read_index, write_index
from train.data.tokenize import tokenize

# Forks before any thread is started; every child but the last is killed at some moment.
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
    # at the count-th rename or fsync, before or after it is done
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


def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path: Path) -> None:
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


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
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
    # as if killed after the third training shard
    kept = {**asdict(index), "complete": False}
    del index.splits["train"][3:], index.splits["validation"][:]
    write_index(out, type(index)(**{**kept, "splits": index.splits}))
    times = {name: (out / name).stat().st_mtime_ns for name in expected}
    assert run()[-1] == reports[-1]
    assert files_of(out) == expected
    rewritten = {name for name in expected if (out / name).stat().st_mtime_ns != times[name]}
    assert not rewritten & {
        f"train-0000{n}.{kind}" for n in range(3) for kind in ("tokens", "ends")
    }
    assert "train-00003.tokens" in rewritten


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

    remedy = "remove it, choose another --out, or use the same arguments"
    assert error_of(source, tokenizer, validation_fraction=0.1) == (
        f"{out}: was made with validation_fraction 0.005, not 0.1: {remedy}"
    )
    assert error_of(source, tokenizer, shard_tokens=7).endswith(
        f"shard_tokens 33554432, not 7: {remedy}"
    )
    assert error_of(source, tokenizer, eos="a").endswith(f"boundary_id 1, not 3: {remedy}")
    assert error_of(source, tokenizer, text_field="t").endswith(
        f"text_field 'text', not 't': {remedy}"
    )
    assert " made with sources " in error_of(other, tokenizer)
    assert " made with tokenizer " in error_of(source, tokenizer_2)


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
    with pytest.raises(ValueError, match=r"made with sources '[0-9a-f]{16}', not '[0-9a-f]{16}': "):
        tokenize([source], tokenizer, out, validation_fraction=0, shard_tokens=100)
    assert files_of(out) == before


def test_an_index_of_version_1(tmp_path: Path) -> None:
    """It can be read, and an incomplete directory is completed by the rules of its version."""
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
    # version 1 does not record the beginning token, so it is determined again
    assert common_vocabulary([TokenDirectory(out)]).bos_id == WORDS.index("<s>")


def test_an_error_in_the_middle_keeps_finished_shards(tmp_path: Path) -> None:
    texts = random_texts(200)
    source = write_lines(tmp_path / "a.jsonl", texts)
    with source.open("a") as file:
        file.write("{\n")
    tokenizer, out = word_tokenizer(tmp_path / "tok"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 201: not valid JSON"):
        tokenize([source], tokenizer, out, shard_tokens=200)
    with pytest.raises(ValueError, match="incomplete; run the same"):
        open_tokens(out, "train")
