"""Sequences packed into rows, in which the tokens that they begin with in common are there once.

In sorted order, sequences that begin alike are neighbors. A row holds them as a tree, depth first: all
tokens of the first sequence, then of each further one those that the one before it does not begin with. The
tokens below one come right after it, so that one number says who sees it: the index of the last of them. A
question with four answers is so run once, and so are the examples that several questions begin with.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from llama_jax.inputs.lengths import padded_length
from llama_jax.text.incremental import common_length

# tokens; with fewer in common, and less than half, sequences may go to different rows
_WORTH_SHARING = 16


class Member(NamedTuple):
    """A sequence in a family: its number, and how many tokens it begins with like the one before it."""

    number: int
    shared: int


class Family(NamedTuple):
    """Sequences that go to the same row, in sorted order, and how many tokens they take there."""

    members: list[Member]
    size: int


class Row(NamedTuple):
    """A row of tokens, padded at its end.

    Attributes:
        ids: the tokens.
        positions: of each token in its sequence.
        visible_until: the last index in the row that attends to each token; -1 for padding.
        slots: of each sequence, by its number: where in the row its tokens are.
    """

    ids: Int[np.ndarray, " length"]
    positions: Int[np.ndarray, " length"]
    visible_until: Int[np.ndarray, " length"]
    slots: dict[int, Int[np.ndarray, " tokens"]]


def pack(sequences: Sequence[Sequence[int]], least: int) -> dict[int, list[list[Family]]]:
    """The families of each row, by the length of the row.

    That is `least`, or for a longer sequence the smallest `padded_length` that holds it; shorter sequences
    fill what it leaves.

    >>> rows = pack([[5, 6, 7], [8, 9, 4], [5, 6, 8]], 16)
    >>> [[family.members for family in row] for row in rows[16]]
    [[[Member(number=0, shared=0), Member(number=2, shared=2)], [Member(number=1, shared=0)]]]
    """
    rows: list[list[Family]] = []
    lengths: list[int] = []
    families = sorted(_families(sequences, least), key=lambda family: -family.size)
    free = np.zeros(len(families), np.int64)  # what each row has left
    for family in families:
        fits = free[: len(rows)] >= family.size
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            lengths.append(max(least, padded_length(family.size)))
            free[row] = lengths[row]
        rows[row].append(family)
        free[row] -= family.size
    return {
        length: [row for row, of_row in zip(rows, lengths, strict=True) if of_row == length]
        for length in sorted(set(lengths))
    }


def _families(sequences: Sequence[Sequence[int]], least: int) -> Iterable[Family]:
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    families: list[Family] = []
    limit, before = 0, -1
    for number in order:
        tokens = sequences[number]
        shared = common_length(sequences[before], tokens) if families else 0
        size = families[-1].size + len(tokens) - shared if families else 0
        if size <= limit and (shared >= _WORTH_SHARING or 0 < len(tokens) <= 2 * shared):
            families[-1].members.append(Member(number, shared))
            families[-1] = families[-1]._replace(size=size)
        else:
            families.append(Family([Member(number, 0)], len(tokens)))
            limit = max(least, padded_length(len(tokens)))
        before = number
    return families


def distinct_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens one row takes that holds all sequences.

    >>> distinct_tokens([[5, 6, 7], [8, 9], [5, 6, 8]])
    6
    """
    total, before = 0, list[int]()
    for tokens in sorted(map(list, sequences)):
        total += len(tokens) - common_length(before, tokens)
        before = tokens
    return total


def write_row(sequences: Sequence[Sequence[int]], families: Iterable[Family], length: int) -> Row:
    """The row of these families.

    >>> row = write_row([[5, 6, 7], [5, 6, 8]], [Family([Member(0, 0), Member(1, 2)], 4)], 5)
    >>> for part in row[:3]:
    ...     print(part)
    [5 6 7 8 0]
    [0 1 2 2 0]
    [ 3  3  2  3 -1]
    >>> row.slots[1]
    array([0, 1, 3], dtype=int32)
    """
    ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    visible_until = np.full(length, -1, np.int32)
    slots: dict[int, np.ndarray] = {}
    used = 0
    for family in families:
        path = np.zeros(0, np.int32)
        for number, shared in family.members:
            tokens = sequences[number]
            begin, used = used, used + len(tokens) - shared
            path = np.concatenate([path[:shared], np.arange(begin, used, dtype=np.int32)])
            ids[begin:used] = tokens[shared:]
            positions[begin:used] = np.arange(shared, len(tokens))
            visible_until[path] = used - 1
            slots[number] = path
    return Row(ids, positions, visible_until, slots)
