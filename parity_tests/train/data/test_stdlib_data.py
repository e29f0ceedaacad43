"""The default data: tokenized once, whatever runs at the same time, and readable by transformers."""

from __future__ import annotations

import os
import sysconfig
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from train.data import stdlib
from train.data.stdlib import EOS, VOCAB_SIZE, stdlib_tokens
from train.data.token_shards import open_tokens, read_index
from train.data.tokens import read_tokens


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library and an empty cache."""
    root = tmp_path / "python"
    for number in range(60):
        path = root / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{number}(value):\n    return value + {number}  # ü𐍈\r\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n'\xe4'")
    (root / "empty.py").touch()
    for name in ("site-packages", "test", "package0/tests"):
        (root / name).mkdir()
        (root / name / "other.py").write_text("raise SystemExit('not part of the library')")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(root)}.__getitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def test_the_library_is_tokenized_once(library: Path, tmp_path: Path) -> None:
    directory = stdlib_tokens()
    assert directory.parent == tmp_path / "cache" / "llama_jax"
    assert os.listdir(directory.parent) == [directory.name]
    index = read_index(directory)
    assert sum(s.documents for shards in index.splits.values() for s in shards) == 60
    assert index.eos_id == 0
    written = (directory / "index.json").stat().st_mtime_ns
    assert stdlib_tokens() == directory
    assert (directory / "index.json").stat().st_mtime_ns == written
    (library / "more.py").write_text("import this")
    assert stdlib_tokens() != directory


def test_transformers_reads_the_tokenizer(library: Path) -> None:
    directory = stdlib_tokens()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == EOS
    assert tokenizer.eos_token_id == 0
    tokens = open_tokens(directory, "train")
    text = tokenizer.decode(read_tokens(tokens, 0, len(tokens), VOCAB_SIZE).tolist())
    documents = text.split(EOS)
    assert documents.pop() == ""
    assert set(documents) <= {p.read_bytes().decode() for p in library.rglob("module*.py")}
    assert tokenizer.decode(tokenizer("never seen: 𐍈\0")["input_ids"]) == "never seen: 𐍈\0"


def test_two_processes_at_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(2)
    make = stdlib._make

    def together(*arguments: object) -> None:
        barrier.wait(timeout=10)  # neither has found the cache
        make(*arguments)

    monkeypatch.setattr(stdlib, "_make", together)
    directories: list[Path] = []
    threads = [
        threading.Thread(target=lambda: directories.append(stdlib_tokens())) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(directories) == 2
    assert directories[0] == directories[1]
    assert os.listdir(directories[0].parent) == [directories[0].name]
    open_tokens(directories[0], "train")


def test_errors_are_not_hidden(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stdlib, "_make", full)
    with pytest.raises(OSError, match="No space left"):
        stdlib_tokens()
    for path in library.rglob("*.py"):
        path.unlink()
    with pytest.raises(ValueError) as caught:
        stdlib_tokens()
    assert str(caught.value) == f"{library}: this Python ships no .py sources; pass --data"


@pytest.mark.slow
def test_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = stdlib_tokens()
    assert read_index(directory).vocab_size == VOCAB_SIZE
    assert len(open_tokens(directory, "train")) > 1_000_000
    assert len(open_tokens(directory, "validation")) > 10_000
