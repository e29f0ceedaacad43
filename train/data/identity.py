"""Which data a run is trained on, identified by digest rather than by the name or size of a directory."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llama_jax.files.json_object import read_json_object
from llama_jax.files.staging import write_text
from train.data.token_shards import Index, Shard, Source, Split, ends_path, open_tokens, read_index
from train.options import split_weight

# the file in a run's folder that identifies its data
FILE = "data.json"

# Shards are read and compared with the index up to this many bytes, which takes seconds; beyond it only
# their sizes are compared.
VERIFIED_BYTES = 1 << 32

SHOWN = 12  # characters of a digest in a message


def data_digest(index: Index) -> str:
    """SHA-256 of the data: every shard of both splits, and what their numbers mean.

    An index of version 1 has no digests of its shards; their sizes, and what they were made from, identify
    it.
    """
    facts: list[object] = [index.dtype, index.vocab_size, index.eos_id]
    for split in sorted(index.splits):
        facts.append([split, [[s.tokens, s.documents, s.sha256] for s in index.splits[split]]])
    if index.version == 1:
        facts.append(index.made_from)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_identity(run: Path, sources: Sequence[Source]) -> None:
    """Record in the folder of a run what data it is trained on."""
    listed = [
        {"path": str(directory), "digest": data_digest(read_index(directory))}
        for directory, _ in sources
    ]
    write_text(run / FILE, json.dumps({"sources": listed}, indent=2) + "\n")


def may_be_moved(run: Path, before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether `now` may be the run's data at other paths; `require_identity` then checks that it is.

    Args:
        before, now: arguments of --data, each PATH or PATH=WEIGHT.
    """

    def weight(text: str) -> float:
        try:
            return split_weight(text)[1]
        except ValueError:  # a path that is gone, with = in it and no weight
            return 1.0

    return (run / FILE).exists() and list(map(weight, before)) == list(map(weight, now))


def require_identity(run: Path, sources: Sequence[Source], remedy: str) -> None:
    """Raise ValueError unless the sources are the data that the run began with.

    Runs of an earlier version recorded no digests; for them any data is accepted.

    Args:
        remedy: what to do, for the end of the message.
    """
    if not (run / FILE).exists():
        return
    listed = read_json_object(run / FILE).get("sources")
    entries = listed if isinstance(listed, list) else []
    expected = [entry.get("digest") for entry in entries if isinstance(entry, dict)]
    if len(expected) != len(sources):
        raise ValueError(f"{run}: found {len(sources)} sources of data, expected {len(expected)}")
    for (directory, _), recorded in zip(sources, expected, strict=True):
        digest = data_digest(read_index(directory))
        if digest != recorded:
            raise ValueError(
                f"{directory}: found data with digest {digest[:SHOWN]}, expected "
                f"{str(recorded)[:SHOWN]}, that of {run}: {remedy}"
            )


def require_intact(sources: Sequence[Source], splits: Sequence[Split]) -> None:
    """Raise ValueError if a shard of the splits is missing or not what its index says.

    Of all shards together the first VERIFIED_BYTES are read.
    """
    to_verify: list[tuple[Path, Shard]] = []
    remaining_bytes = VERIFIED_BYTES
    for directory, _ in sources:
        index = read_index(directory)
        for split in splits:
            open_tokens(directory, split)  # checks existence and sizes
            for shard in index.splits[split]:
                remaining_bytes -= (directory / shard.file).stat().st_size
                if shard.sha256 is not None and remaining_bytes >= 0:
                    to_verify.append((directory, shard))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_shard_digest, to_verify)
        for (directory, shard), digest in zip(to_verify, digests, strict=True):
            if digest != shard.sha256:
                raise ValueError(
                    f"{directory / shard.file}: found contents with digest {digest[:SHOWN]}, expected "
                    f"{str(shard.sha256)[:SHOWN]} by the index: restore the file, or tokenize again"
                )


def _shard_digest(location: tuple[Path, Shard]) -> str:
    directory, shard = location
    digest = hashlib.sha256()
    for path in (directory / shard.file, ends_path(directory / shard.file)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
