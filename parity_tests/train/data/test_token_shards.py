"""Token files: read back across shards, and the error messages for damaged ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.train.corpus import token_directory
from train.data.token_shards import open_tokens, read_index
from train.data.tokens import document_ends, read_tokens

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5)


def error_of(directory: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as caught:
        open_tokens(directory, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(deadline=None)
@given(shards=st.lists(DOCUMENTS, min_size=1, max_size=4), data=st.data())
def test_any_range_of_tokens_and_ends(
    shards: list[list[list[int]]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = open_tokens(token_directory(tmp_path_factory.mktemp("shards"), shards), "train")
    documents = [document for shard in shards for document in shard]
    row = [token for document in documents for token in document]
    ends = np.cumsum([len(document) for document in documents])
    assert len(tokens) == len(row)
    start = data.draw(st.integers(0, len(row) - 1))
    stop = data.draw(st.integers(start + 1, len(row)))
    ids = read_tokens(tokens, start, stop, 100)
    assert ids.dtype == np.int32
    assert ids.tolist() == row[start:stop]
    expected = [end for end in ends.tolist() if start < end <= stop]
    assert document_ends(tokens, start, stop).tolist() == expected


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "size"), [(65536, "uint16", 2), (65537, "uint32", 4)]
)
def test_the_dtype_is_the_smallest(vocab_size: int, dtype: str, size: int, tmp_path: Path) -> None:
    ids = [0, vocab_size - 1, 258]
    directory = token_directory(tmp_path, [[ids]], vocab_size=vocab_size)
    assert read_index(directory).dtype == dtype
    raw = (directory / "train-00000.tokens").read_bytes()
    assert raw == b"".join(token.to_bytes(size, "little") for token in ids)
    tokens = open_tokens(directory, "train")
    assert read_tokens(tokens, 0, 3, vocab_size).tolist() == ids


def test_an_id_that_the_model_lacks(tmp_path: Path) -> None:
    tokens = open_tokens(token_directory(tmp_path, [[[1, 2], [3]], [[4], [5, 50, 60]]]), "train")
    assert read_tokens(tokens, 0, 5, 50).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError) as caught:
        read_tokens(tokens, 1, 7, 50)
    assert str(caught.value) == (
        f"{tmp_path}/train-00001.tokens, token 2: found id 50, expected less than the model's vocab_size 50"
    )


def test_damaged_files(tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[1, 2, 3]], [[4, 5], [6]]])
    for name, intact_size, contents in (
        ("train-00001.tokens", 6, "3 uint16"),
        ("train-00001.ends", 16, "2 int64"),
    ):
        path = directory / name
        intact = path.read_bytes()
        for size in (0, intact_size - 1, intact_size + 2):
            path.write_bytes(intact[:size].ljust(size))
            assert error_of(directory) == (
                f"{path}: found {size} bytes, expected {intact_size} for the {contents} in the index"
            )
        path.unlink()
        assert error_of(directory) == f"{path}: no such file, but the index lists it"
        path.write_bytes(intact)
    np.asarray([2, 4], "<i8").tofile(directory / "train-00001.ends")
    assert error_of(directory) == (
        f"{directory}/train-00001.ends: found 4 as the last end, expected 3"
    )


def test_wrong_indexes(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    remedy = "make a token directory with `python -m train tokenize`"
    assert error_of(tmp_path / "none") == f"{tmp_path}/none: no such file or directory; {remedy}"
    (tmp_path / "a.parquet").touch()
    for other in (tmp_path, tmp_path / "a.parquet"):
        assert error_of(other) == (
            f"{other}: found neither index.json of a token directory nor token files (.bin, .arrow, "
            f".array_record): {remedy}"
        )
    token_directory(tmp_path, [[[1]]])
    good = json.loads(path.read_text())
    path.write_text("{")
    assert error_of(tmp_path).startswith(f"{path}: not valid JSON (")
    for bad, version in (([1], None), ({}, None), ({**good, "version": 3}, 3)):
        path.write_text(json.dumps(bad))
        assert error_of(tmp_path) == f"{path}: found version {version}, expected 2"
    for bad in ({"extra": 1}, {"splits": {}}, {"splits": {"train": [{}]}}, {"vocab_size": "x"}):
        path.write_text(json.dumps({**good, **bad}))
        assert error_of(tmp_path).startswith(f"{path}: wrong or missing fields (")
    path.write_text(json.dumps({**good, "dtype": "uint8"}))
    assert error_of(tmp_path) == (
        f"{path}: found dtype 'uint8', expected 'uint16' for a vocabulary of 100"
    )


def test_incomplete_directories_and_empty_splits(tmp_path: Path) -> None:
    directory = token_directory(tmp_path / "a", [[[1]]], complete=False)
    assert error_of(directory) == (
        f"{directory}: incomplete; run the same `python -m train tokenize` again to complete it"
    )
    directory = token_directory(tmp_path / "b", [[[1]]])
    assert error_of(directory, "validation") == (
        f"{directory}: the validation split is empty: tokenize with a larger --validation-fraction or more "
        "documents"
    )


def test_files_are_not_read_into_memory(tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[1]]])
    size = 1 << 34  # a sparse file
    with (directory / "train-00000.tokens").open("wb") as file:
        file.truncate(2 * size)
    np.asarray([size], "<i8").tofile(directory / "train-00000.ends")
    index = json.loads((directory / "index.json").read_text())
    index["splits"]["train"][0]["tokens"] = size
    (directory / "index.json").write_text(json.dumps(index))
    tokens = open_tokens(directory, "train")
    assert len(tokens) == size
    assert read_tokens(tokens, size - 4, size, 100).tolist() == [0] * 4
    assert len(os.listdir(directory)) == 3
