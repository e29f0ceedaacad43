"""Windows against a slow reference, their order, and batches shared by any number of processes."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.loss import IGNORE_INDEX
from parity_tests.train.corpus import token_directory
from train.data.token_directory import TokenDirectory
from train.data.token_shards import open_tokens
from train.data.windows import Window, batches, window, windows

VOCAB = 100
SHARDS = st.lists(
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def reference(documents: list[list[int]], length: int) -> list[dict[str, list[int]]]:
    """All windows, built token by token from pairs of document and id."""
    row = [(number, token) for number, document in enumerate(documents) for token in document]
    expected = []
    start = 0
    while start == 0 or start < len(row) - 1:
        fields: dict[str, list[int]] = {
            "input_ids": [], "labels": [], "segment_ids": [], "position_ids": [],
        }  # fmt: skip
        owners: list[int | None] = []
        for position in range(start, start + length):
            owner, token = row[position] if position < len(row) else (None, 0)
            follower, following = row[position + 1] if position + 1 < len(row) else (None, None)
            same = owner is not None and follower == owner
            new = not owners or owner != owners[-1]
            fields["input_ids"].append(token)
            fields["labels"].append(following if same else IGNORE_INDEX)
            fields["segment_ids"].append(
                0 if not owners else fields["segment_ids"][-1] + (1 if new else 0)
            )
            fields["position_ids"].append(0 if new else fields["position_ids"][-1] + 1)
            owners.append(owner)
        expected.append(fields)
        start += length
    return expected


def plain(windows: list[Window]) -> list[dict[str, list[int]]]:
    return [{name: array.tolist() for name, array in window.items()} for window in windows]


def read(directory: Path, split: str = "train", length: int = 4, seed: int = 0, weight: float = 1):
    return windows(
        [TokenDirectory(directory, weight)],
        split=split,
        sequence_length=length,
        vocab_size=VOCAB,
        seed=seed,
    )


@settings(deadline=None)
@given(shards=SHARDS, length=st.integers(1, 20))
def test_windows_equal_the_reference(
    shards: list[list[list[int]]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = [document for shard in shards for document in shard]
    directory = token_directory(tmp_path_factory.mktemp("t"), shards, shards, vocab_size=VOCAB)
    dataset = read(directory, "validation", length)
    actual = list(dataset)
    assert all(a.dtype == np.int32 and a.shape == (length,) for w in actual for a in w.values())
    assert plain(actual) == reference(documents, length)
    # every token but the first of its document is a label exactly once
    labels = Counter(label for w in actual for label in w["labels"].tolist())
    expected = Counter(token for document in documents for token in document[1:])
    assert labels - Counter({IGNORE_INDEX: labels[IGNORE_INDEX]}) == expected


def test_a_document_longer_than_the_window_and_one_token(tmp_path: Path) -> None:
    tokens = open_tokens(token_directory(tmp_path / "a", [[[*range(10)]]]), "train")
    middle = window(tokens, 1, 4, VOCAB)
    assert plain([middle]) == [
        {
            "input_ids": [4, 5, 6, 7],
            "labels": [5, 6, 7, 8],
            "segment_ids": [0] * 4,
            "position_ids": [0, 1, 2, 3],
        }
    ]
    tokens = open_tokens(token_directory(tmp_path / "b", [[[7]]]), "train")
    assert plain([window(tokens, 0, 3, VOCAB)]) == [
        {
            "input_ids": [7, 0, 0],
            "labels": [IGNORE_INDEX] * 3,
            "segment_ids": [0, 1, 1],
            "position_ids": [0, 0, 1],
        }
    ]


@pytest.mark.parametrize(("count", "expected"), [(8, 2), (9, 2), (10, 3), (1, 1), (5, 1)])
def test_number_of_windows(count: int, expected: int, tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[1] * count]], [[[1] * count]])
    assert len(read(directory, "validation", 4)) == expected


def test_training_is_shuffled_anew_in_each_epoch(tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[n % 100, n % 90] for n in range(200)]])

    def epochs(seed: int) -> list[list[str]]:
        dataset = read(directory, seed=seed)
        count = 100
        return [
            [str(w) for w in plain([dataset[e * count + n] for n in range(count)])]
            for e in range(3)
        ]

    first, second, third = epochs(1)
    assert sorted(first) == sorted(second) == sorted(third)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    in_order = [
        str(w)
        for w in plain([window(open_tokens(directory, "train"), n, 4, VOCAB) for n in range(100)])
    ]
    assert sorted(first) == sorted(in_order)
    # spread over the epoch, not near where they were
    moved = [abs(in_order.index(w) - n) for n, w in enumerate(first)]
    assert np.mean(moved) > 20
    assert epochs(1) == [first, second, third]
    assert epochs(2)[0] != first


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    a = token_directory(tmp_path / "a", [[[1] * 4] * 30])
    b = token_directory(tmp_path / "b", [[[2] * 4] * 5])  # repeated more often
    dataset = windows(
        [TokenDirectory(a, 3.0), TokenDirectory(b, 1.0)],
        split="train",
        sequence_length=4,
        vocab_size=VOCAB,
        seed=0,
    )
    for start in (0, 10_000):
        drawn = [int(dataset[start + n]["input_ids"][0]) for n in range(400)]
        assert Counter(drawn) == {1: 300, 2: 100}
        assert all(2 in drawn[n : n + 5] for n in range(395))  # evenly


def test_validation_is_every_window_of_every_source(tmp_path: Path) -> None:
    a = token_directory(tmp_path / "a", [[[9]]], [[[1] * 9]])
    b = token_directory(tmp_path / "b", [[[9]]], [[[2] * 6], [[3] * 2]])
    dataset = windows(
        [TokenDirectory(a, 5.0), TokenDirectory(b, 1.0)],
        split="validation",
        sequence_length=4,
        vocab_size=VOCAB,
        seed=0,
    )
    assert [w["input_ids"].tolist() for w in dataset] == [
        [1] * 4, [1] * 4, [2] * 4, [2, 2, 3, 3],
    ]  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(processes: int, tmp_path: Path) -> None:
    documents = [[n % VOCAB, (3 * n) % VOCAB] for n in range(50)]
    dataset = read(token_directory(tmp_path, [documents[:20], documents[20:]]))
    size, steps = 8, 10
    share = size // processes
    parts = [
        list(
            islice(batches(dataset, batch_size=size, rows=range(p * share, (p + 1) * share)), steps)
        )
        for p in range(processes)
    ]
    for step in range(steps):
        expected = [dataset[step * size + row] for row in range(size)]
        for name, array in parts[0][step].items():
            assert array.shape == (share, 4)
            assert array.dtype == np.int32
            joined = np.concatenate([part[step][name] for part in parts])
            assert joined.tolist() == [w[name].tolist() for w in expected]


@pytest.mark.parametrize(("start", "documents"), [(1, 4), (7, 4), (500, 600)])
def test_batches_from_a_later_step(start: int, documents: int, tmp_path: Path) -> None:
    # four documents make three windows, so a batch spans epochs
    dataset = read(token_directory(tmp_path, [[[n % 99, 1, 2] for n in range(documents)]]))
    rows = [4, 1, 3]
    from_start = list(islice(batches(dataset, batch_size=5, rows=rows), start + 4))
    tail = list(islice(batches(dataset, batch_size=5, rows=rows, start_step=start), 4))
    assert plain(tail) == plain(from_start[start:])


def test_the_last_batch_of_validation_is_filled_with_padding(tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[1]]], [[[*range(21)]]])  # 5 windows of 4
    dataset = read(directory, "validation")
    parts = [list(batches(dataset, batch_size=4, rows=rows)) for rows in ((0, 1), (2, 3))]
    assert [len(part) for part in parts] == [2, 2]  # as many steps in every process
    labels = np.concatenate([b["labels"] for part in parts for b in part])
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == list(range(1, 21))
    assert set(parts[1][1]["labels"].ravel().tolist()) == {IGNORE_INDEX}
    assert parts[1][1]["input_ids"].shape == (2, 4)
    assert list(batches(dataset, batch_size=4, rows=[0], start_step=2)) == []


def test_the_thread_ends_with_the_iterator(tmp_path: Path) -> None:
    dataset = read(token_directory(tmp_path, [[[1, 2, 3]]]))

    def readers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    for thread in readers():
        thread.join(timeout=5)
    iterator = batches(dataset, batch_size=2, rows=[0, 1])
    assert not readers()
    next(iterator)
    (thread,) = readers()
    iterator.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_an_id_that_the_model_lacks(tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[1, 2, 3, 4], [5, 150]]], vocab_size=200)
    iterator = batches(read(directory), batch_size=2, rows=[0, 1])
    with pytest.raises(ValueError) as caught:
        next(iterator)
    assert str(caught.value) == (
        f"{directory}/train-00000.tokens, token 5: found id 150, expected less than the model's "
        "vocab_size 100"
    )


def test_wrong_arguments(tmp_path: Path) -> None:
    directory = token_directory(tmp_path, [[[1, 2, 3]]])

    def error_of(call) -> str:
        with pytest.raises(ValueError) as caught:
            call()
        return str(caught.value)

    for weight in (0.0, -1.0, float("nan"), float("inf")):
        assert error_of(lambda weight=weight: read(directory, weight=weight)) == (
            f"{directory}: found weight {weight}, expected a positive number"
        )
    assert error_of(lambda: read(directory, length=0)) == (
        "sequence_length: found 0, expected at least 1"
    )
    for seed in (-1, 1 << 32):
        assert error_of(lambda seed=seed: read(directory, seed=seed)) == (
            f"seed: found {seed}, expected 0 to 2**32 - 1"
        )
    assert error_of(lambda: read(directory, "validation")).startswith(
        f"{directory}: the validation split is empty"
    )
    options = {"split": "train", "sequence_length": 4, "vocab_size": 9, "seed": 0}
    assert error_of(lambda: windows([], **options)) == "sources: give at least one"
    dataset = read(directory)
    for rows in ([], [0, 2], [-1]):
        assert error_of(lambda rows=rows: batches(dataset, batch_size=2, rows=rows)) == (
            f"rows: found {rows}, expected some of 0 to 1"
        )
    assert error_of(lambda: batches(dataset, batch_size=2, rows=[0], start_step=-1)) == (
        "start_step: found -1, expected at least 0"
    )
