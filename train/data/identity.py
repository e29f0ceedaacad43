"""Which tokens a run is trained on: by digest, not by the name or size of a directory."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llama_jax.files.json_object import read_json_object
from llama_jax.files.staging import write_text
from train.data.token_shards import Index, Shard, Split, ends_path, open_tokens, read_index
from train.options import split_weight

# the file of a run that says what data it is of
FILE = "data.json"

# Shards are read whole to be compared with the index only up to here, which takes seconds; beyond it their
# sizes and the index alone are looked at.
VERIFIED_BYTES = 1 << 32

SHOWN = 12  # characters of a digest in a message

Source = tuple[Path, float]


def data_digest(index: Index) -> str:
    """SHA-256 of what a model is trained on: every shard of both splits, and what its numbers mean.

    An index of version 1 has no digests of its shards; it is told apart by what it says of them and of
    what they were made from.
    """
    facts: list[object] = [index.dtype, index.vocab_size, index.eos_id]
    for split in sorted(index.splits):
        facts.append([split, [[s.tokens, s.documents, s.sha256] for s in index.splits[split]]])
    if index.version == 1:
        facts.append(index.made_from)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_identity(run: Path, sources: Sequence[Source]) -> None:
    """Write down in the folder of a run what data it is of."""
    listed = [
        {"path": str(directory), "digest": data_digest(read_index(directory))}
        for directory, _ in sources
    ]
    write_text(run / FILE, json.dumps({"sources": listed}, indent=2) + "\n")


def may_be_moved(run: Path, before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether `now` can be the data of the run in another place, which `require_identity` then finds out.

    Args:
        before, now: PATH or PATH=WEIGHT each.
    """

    def weight(text: str) -> float:
        try:
            return split_weight(text)[1]
        except ValueError:  # it is there no more: an = in a path without weight
            return 1.0

    return (run / FILE).exists() and list(map(weight, before)) == list(map(weight, now))


def require_identity(run: Path, sources: Sequence[Source], remedy: str) -> None:
    """Raise ValueError unless the sources are the data that the run began with.

    A run that an earlier version began has nothing written down: any data is taken for its own.

    Args:
        remedy: what to do, for the end of the message.
    """
    if not (run / FILE).exists():
        return
    listed = read_json_object(run / FILE).get("sources")
    entries = listed if isinstance(listed, list) else []
    known = [each.get("digest") for each in entries if isinstance(each, dict)]
    found = [data_digest(read_index(directory)) for directory, _ in sources]
    if len(known) != len(found):
        raise ValueError(f"{run}: found {len(found)} sources of data, expected {len(known)}")
    for (directory, _), now, before in zip(sources, found, known, strict=True):
        if now != before:
            raise ValueError(
                f"{directory}: found data with digest {now[:SHOWN]}, expected {str(before)[:SHOWN]}, that "
                f"of {run}: {remedy}"
            )


def require_intact(sources: Sequence[Source], splits: Sequence[Split]) -> None:
    """Raise ValueError for a shard of the splits that is missing or not what its index says.

    The first VERIFIED_BYTES of all shards together are read.
    """
    todo: list[tuple[Path, Shard]] = []
    left = VERIFIED_BYTES
    for directory, _ in sources:
        index = read_index(directory)
        for split in splits:
            open_tokens(directory, split)  # that they are there, and their sizes
            for shard in index.splits[split]:
                left -= (directory / shard.file).stat().st_size
                if shard.sha256 is not None and left >= 0:
                    todo.append((directory, shard))
    with ThreadPoolExecutor() as pool:
        for (directory, shard), found in zip(todo, pool.map(_shard_digest, todo), strict=True):
            if found != shard.sha256:
                raise ValueError(
                    f"{directory / shard.file}: found contents with digest {found[:SHOWN]}, expected "
                    f"{str(shard.sha256)[:SHOWN]} by the index: restore the file, or tokenize again"
                )


def _shard_digest(place: tuple[Path, Shard]) -> str:
    directory, shard = place
    digest = hashlib.sha256()
    for path in (directory / shard.file, ends_path(directory / shard.file)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
