"""Which data a run is trained on, identified by digest rather than by the name or size of a directory."""

import json
from collections.abc import Sequence
from pathlib import Path

from llama_jax.files.json_object import read_json_object
from llama_jax.files.staging import write_text
from train.data.tokens import Source, Split
from train.options import split_weight

# the file in a run's folder that identifies its data
FILE = "data.json"

# Up to this many bytes of the data are read and checked, which takes seconds; beyond it only sizes are
# compared.
VERIFIED_BYTES = 1 << 32

SHOWN = 12  # characters of a digest in a message


def write_identity(run: Path, sources: Sequence[Source]) -> None:
    """Record in the folder of a run what data it is trained on."""
    listed = [{"path": str(source.path), "digest": source.digest()} for source in sources]
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
    for source, recorded in zip(sources, expected, strict=True):
        digest = source.digest()
        if digest != recorded:
            raise ValueError(
                f"{source.path}: found data with digest {digest[:SHOWN]}, expected "
                f"{str(recorded)[:SHOWN]}, that of {run}: {remedy}"
            )


def require_intact(sources: Sequence[Source], splits: Sequence[Split]) -> None:
    """Raise ValueError if the splits are missing or damaged.

    Of all sources together the first VERIFIED_BYTES are read.
    """
    remaining = VERIFIED_BYTES
    for source in sources:
        remaining = source.require_intact(splits, remaining)
