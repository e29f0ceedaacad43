"""Sequences in rows: each is there once, sees itself alone, and shares what it begins with."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.evaluation.packing import pack, padded_length, write_row

# few tokens, so that many sequences begin alike, and some are equal
SEQUENCES = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=40), min_size=1, max_size=20)


@settings(deadline=None)
@given(SEQUENCES, st.sampled_from([16, 32, 256]))
def test_each_sequence_sees_itself_alone(sequences: list[list[int]], least: int) -> None:
    found = []
    for length, rows in pack(sequences, least).items():
        for families in rows:
            row = write_row(sequences, families, length)
            for number, slots in row.slots.items():
                found.append(number)
                assert row.ids[slots].tolist() == sequences[number]
                assert row.positions[slots].tolist() == list(range(len(sequences[number])))
                for index, slot in enumerate(slots):
                    visible = np.flatnonzero(row.visible_until[: slot + 1] >= slot)
                    assert visible.tolist() == slots[: index + 1].tolist()
    assert sorted(found) == list(range(len(sequences)))


@settings(deadline=None)
@given(SEQUENCES)
def test_rows_are_as_long_as_they_must_be(sequences: list[list[int]]) -> None:
    lengths = set(pack(sequences, 16))
    longest = max(map(len, sequences))
    assert max(lengths) == padded_length(longest)
    assert set(pack(sequences, 64)) == {64}


def test_a_common_beginning_is_there_once() -> None:
    rng = np.random.default_rng(0)
    question, other = (rng.integers(0, 1000, 30).tolist() for _ in range(2))
    answers = [[1000 + n, 7, n] for n in range(4)]
    sequences = [[*question, *answer] for answer in answers] + [[*other, *answers[0]], question]
    ((length, ((first, second),)),) = pack(sequences, 128).items()
    assert length == 128
    assert first.size == 30 + 4 * 3
    assert sorted(member.number for member in first.members) == [0, 1, 2, 3, 5]
    assert second.size == 33


def test_examples_before_all_questions_are_there_once_in_each_row() -> None:
    rng = np.random.default_rng(0)
    examples = rng.integers(0, 1000, 100).tolist()
    sequences = [[*examples, *rng.integers(0, 1000, 20).tolist()] for _ in range(16)]
    assert {length: len(rows) for length, rows in pack(sequences, 512).items()} == {512: 1}
    assert {length: len(rows) for length, rows in pack(sequences, 256).items()} == {256: 3}


@settings(deadline=None)
@given(st.integers(1, 100_000))
def test_padding_is_at_most_half_the_length(length: int) -> None:
    assert length <= padded_length(length) <= max(16, length * 3 / 2)


@pytest.mark.parametrize("least", [16, 256])
def test_short_sequences_fill_what_long_ones_leave(least: int) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 1000, length).tolist() for length in (300, 40, 30, 10)]
    assert {length: len(rows) for length, rows in pack(sequences, least).items()} == {384: 1}
