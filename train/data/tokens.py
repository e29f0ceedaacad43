"""One split of a source: a long sequence of tokens, in one or more files, divided into documents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

# Where documents end: the positions after the first argument up to the second, sorted int64.
Ends = Callable[[int, int], np.ndarray]

_BLOCK = 1 << 20  # tokens that are searched at a time


class Ids(Protocol):
    """The ids of one file: a memory-mapped array, or whatever reads ranges like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Vocabulary(NamedTuple):
    """What the ids of a source mean.

    tokenizer: the directory of its files.
    vocab_size: its largest id plus one.
    bos_id, eos_id: the beginning- and end-of-text tokens; at least one is not None.
    """

    tokenizer: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None


class Source(Protocol):
    """One of the sources of a run's data: `--data PATH=WEIGHT`."""

    @property
    def path(self) -> Path:
        """Where it is; its name in messages."""

    @property
    def weight(self) -> float:
        """Its part of a mixture, relative to the other sources'."""

    def vocabulary(self) -> Vocabulary:
        """Raises ValueError if the tokenizer is missing or damaged."""

    def require_validation(self) -> None:
        """Raise ValueError if there are no tokens for evaluations."""

    def open(self, split: Split) -> "Tokens":
        """Memory-map a split. Raises ValueError if it is empty or damaged."""

    def digest(self) -> str:
        """SHA-256 by which other data with the same names and sizes is noticed."""

    def require_intact(self, splits: Sequence[Split], bytes_to_read: int) -> int:
        """Raise ValueError if the splits are damaged; returns how many of the bytes were not used."""


@dataclass(frozen=True)
class Tokens:
    """One split, memory-mapped; or the part of it from token `first` on, of `length` tokens.

    names: of the shards, in messages.
    shards: the ids in each file, as stored.
    starts: [shards + 1] int64: where each shard begins in the sequence, and where the last one ends.
    ends: where documents end in the sequence.
    delimiter: the id by which documents are told apart; None if an index says where they end.
    hint: what an id out of range may mean, as the end of an error message.
    in_loss: [tokens] of each shard, 0 for tokens that are no labels; None: all are.
    """

    names: tuple[str, ...]
    shards: tuple[Ids, ...]
    starts: np.ndarray
    ends: Ends
    first: int
    length: int
    delimiter: int | None = None
    hint: str = ""
    in_loss: tuple[Ids, ...] | None = None

    def __len__(self) -> int:
        return self.length


def join_shards(
    names: Sequence[str | Path],
    shards: Sequence[Ids],
    ends: Sequence[Ends] | Callable[[Sequence[Ids], np.ndarray], Ends],
) -> Tokens:
    """One sequence of all shards.

    Args:
        ends: of the documents within each shard; or a function of the shards and their starts, where a
            document may go on in the next shard.
    """
    starts = np.cumsum([0, *map(len, shards)], dtype=np.int64)
    joined = ends(shards, starts) if callable(ends) else _ends_of_shards(ends, starts)
    return Tokens(
        tuple(map(str, names)), tuple(shards), starts, joined, first=0, length=int(starts[-1])
    )


def part_of(tokens: Tokens, start: int, stop: int) -> Tokens:
    """The part from `start` up to `stop`, which must be where documents end."""
    return replace(tokens, first=tokens.first + start, length=stop - start)


def read_tokens(tokens: Tokens, start: int, stop: int, vocab_size: int) -> np.ndarray:
    """A copy of the ids from `start` up to `stop` of the sequence: [stop - start] int32.

    Raises:
        ValueError: an id that is not below `vocab_size`, or negative; the message says where.
    """
    ids = np.empty(stop - start, np.int32)
    for place, part in _checked(tokens, start, stop, vocab_size, "the model's vocab_size"):
        ids[place - start : place - start + len(part)] = part
    return ids


def require_ids(tokens: Tokens, stop: int, vocab_size: int) -> None:
    """Raise ValueError if one of the ids before `stop` is not below `vocab_size`, the tokenizer's."""
    for start in range(0, stop, _BLOCK):
        block = start, min(start + _BLOCK, stop)
        for _ in _checked(tokens, *block, vocab_size, "the tokenizer's vocabulary of"):
            pass


def _checked(
    tokens: Tokens, start: int, stop: int, vocab_size: int, limit: str
) -> Iterator[tuple[int, np.ndarray]]:
    """The ids from `start` up to `stop` as stored, in parts with their places in the sequence."""
    first, last = start + tokens.first, stop + tokens.first
    for shard, low, high in _parts(tokens.starts, first, last):
        ids = tokens.shards[shard][low:high]
        signed = ids.dtype.kind == "i"
        if ids.max() >= vocab_size or (signed and ids.min() < 0):
            index = int(np.argmax((ids >= vocab_size) | (signed & (ids < 0))))
            expected = "at least 0" if ids[index] < 0 else f"less than {limit} {vocab_size}"
            raise ValueError(
                f"{tokens.names[shard]}, token {low + index}: found id {ids[index]}, expected "
                f"{expected}{tokens.hint}"
            )
        yield int(tokens.starts[shard]) + low - tokens.first, ids


def document_ends(tokens: Tokens, start: int, stop: int) -> np.ndarray:
    """Positions in the sequence, after `start` up to `stop`, where documents end: [documents] int64.

    Each once: documents without a token do not count.
    """
    ends = tokens.ends(start + tokens.first, stop + tokens.first) - tokens.first
    return ends[np.diff(ends, prepend=-1) != 0]


def loss_mask(tokens: Tokens, start: int, stop: int) -> np.ndarray | None:
    """Which tokens from `start` up to `stop` are labels: [stop - start] bool; None if all are."""
    if tokens.in_loss is None:
        return None
    parts = _parts(tokens.starts, start + tokens.first, stop + tokens.first)
    return np.concatenate([tokens.in_loss[shard][low:high] != 0 for shard, low, high in parts])


def require_loss(tokens: Tokens, name: str | Path) -> None:
    """Raise ValueError if no token is in the loss."""
    if tokens.in_loss is None:
        return
    for start in range(0, len(tokens), _BLOCK):
        mask = loss_mask(tokens, start, min(start + _BLOCK, len(tokens)))
        if mask is not None and mask.any():
            return
    raise ValueError(
        f"{name}: none of its tokens is in the loss: if these are chats, the template must mark what the "
        "assistant says with {% generation %} when they are tokenized, or use `tokenize --chat`"
    )


def nearest_end(tokens: Tokens, position: int) -> int | None:
    """The last place up to `position` where a document ends or, if there is none, the first one after it.

    Neither 0 nor the end of all tokens counts; None if there is no other.
    """
    for stop in range(position, 0, -_BLOCK):
        if len(ends := document_ends(tokens, max(stop - _BLOCK, 0), stop)):
            return int(ends[-1])
    for start in range(position, len(tokens), _BLOCK):
        ends = document_ends(tokens, start, min(start + _BLOCK, len(tokens)))
        if len(ends) and ends[0] < len(tokens):
            return int(ends[0])
    return None


def listed_ends(ends: np.ndarray) -> Ends:
    """Ends in a sorted array, which may be memory-mapped."""

    def between(start: int, stop: int) -> np.ndarray:
        # of the array's dtype, or numpy converts all of the array
        bounds = np.asarray([start, stop], ends.dtype)
        first, last = np.searchsorted(ends, bounds, side="right")
        return np.asarray(ends[first:last], np.int64)

    return between


def _ends_of_shards(ends: Sequence[Ends], starts: np.ndarray) -> Ends:
    def between(start: int, stop: int) -> np.ndarray:
        positions = [np.empty(0, np.int64)]
        for shard, low, high in _parts(starts, start, stop):
            positions.append(ends[shard](low, high) + starts[shard])
        return np.concatenate(positions)

    return between


def _parts(starts: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
    """The shards that overlap `start` to `stop`: number, and the range within the shard."""
    first = int(np.searchsorted(starts, start, side="right")) - 1
    parts = []
    for shard in range(first, len(starts) - 1):
        begin, end = (int(position) for position in starts[shard : shard + 2])
        if begin >= stop:
            break
        if end > max(start, begin):
            parts.append((shard, max(start - begin, 0), min(stop, end) - begin))
    return parts


def delimited_ends(token: int, *, before: bool) -> Callable[[Sequence[Ids], np.ndarray], Ends]:
    """Ends where each document begins, or else ends, with `token`; documents may span shards.

    Args:
        before: the token stands at the beginning of each document.
    """

    def join(shards: Sequence[Ids], starts: np.ndarray) -> Ends:
        length = int(starts[-1])

        def between(start: int, stop: int) -> np.ndarray:
            low, high = (start + 1, min(stop + 1, length)) if before else (start, stop)
            positions = [np.empty(0, np.int64)]
            for shard, part_low, part_high in _parts(starts, low, high):
                (found,) = np.nonzero(shards[shard][part_low:part_high] == token)
                positions.append(found + (starts[shard] + part_low + (0 if before else 1)))
            ends = np.concatenate(positions)
            # the last document ends with the tokens, whatever they are
            if stop == length and not (len(ends) and ends[-1] == length):
                ends = np.append(ends, np.int64(length))
            return ends

        return between

    return join
