"""Every command splits text files into lines as Python's text mode does."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.cli import chat as chat_command
from llama_jax.cli import score
from llama_jax.text.lines import byte_lines, read_lines, read_text, split_lines
from parity_tests.report import tokens
from train.data.documents import read_documents
from train.options_toml import flags_of

# ends of lines, and first of the others what only str.splitlines takes for such
ENDS = ["\n", "\r\n", "\r"]
OTHERS = ["\u2028", "\u2029", "\x0c", "\x0b", "\x85", "\x1c", "\x1d", "\x1e", "a", "é", "𐍈", " "]
TEXTS = st.lists(st.sampled_from([*ENDS, *OTHERS]), max_size=12).map("".join)


def pythons(path: Path) -> list[str]:
    """Lines as Python's text mode reads them."""
    with path.open(encoding="utf-8-sig") as file:
        return [line.removesuffix("\n") for line in file]


@given(text=TEXTS, marked=st.booleans())
def test_lines_match_pythons_text_mode(
    text: str, marked: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" * marked + text.encode())
    expected = pythons(path)
    assert read_lines(path) == split_lines(text) == expected
    assert read_text(path) == text
    inner = [line.decode() for line in byte_lines(io.BytesIO(text.encode()))]
    assert inner[: len(expected)] == expected
    assert inner[len(expected) :] in ([], [""])  # what follows an old Macintosh's last line


def test_every_command_splits_lines_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\ufeffone\u2028still\r\ntwo\x0cstill\rthree\x85still\nfour\x0bstill"
    expected = ["one\u2028still", "two\x0cstill", "three\x85still", "four\x0bstill"]
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert pythons(path) == expected
    assert score._lines(path) == expected
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert list(chat_command._lines()) == expected
    # a text is one document with all its ends; JSON lines are a document each
    assert list(read_documents([path])) == [text.removeprefix("\ufeff")]
    ends = ["\r\n", "\r", "\n", ""]
    lines = [json.dumps({"text": line}, ensure_ascii=False) for line in expected]
    content = "\ufeff" + "".join(map("".join, zip(lines, ends, strict=True)))
    (tmp_path / "a.JSONL").write_bytes(content.encode())
    assert list(read_documents([tmp_path / "a.JSONL"])) == expected


def test_ids_and_options_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes(b"\xef\xbb\xbf1, 2\r\n3\x0c4")
    config = argparse.Namespace(vocab_size=10, max_position_embeddings=8)
    checkpoint = argparse.Namespace(config=config)
    assert tokens.read_tokens(path, checkpoint).tolist() == [[1, 2, 3, 4]]
    np.save(tmp_path / "a.npy", np.asarray([1, 2]))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert tokens.read_tokens(tmp_path / "A.NPY", checkpoint).tolist() == [[1, 2]]
    path.write_bytes(b"\xef\xbb\xbfsteps = 4\r\n")
    assert flags_of(path) == ["--steps=4"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_named(encoding: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    mark = "\ufeff" if encoding.endswith("be") else ""  # Python writes it where no order is named
    path.write_bytes(f'{mark}{{"text": "é"}}\n'.encode(encoding))
    kind = encoding.removesuffix("-be").upper()
    with pytest.raises(ValueError) as caught:
        read_text(path)
    told = f"found {kind}, expected UTF-8: iconv -f {kind} -t UTF-8 converts it"
    assert str(caught.value) == f"{path}: {told}"
    with pytest.raises(ValueError) as caught:
        list(read_documents([path]))
    assert str(caught.value) == f"{path}{', line 1' * (name == 'a.jsonl')}: {told}"


def test_invalid_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\n\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: found the byte 0xe9, expected UTF-8$"):
        read_lines(path)
