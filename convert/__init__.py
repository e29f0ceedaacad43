"""Checkpoints from one format into another, a tensor at a time: GGUF into Hugging Face directories.

python -m convert SRC DST      and the same as functions:

from convert import convert, info
convert("model.gguf", "model/", dtype="bfloat16")
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import gguf, huggingface
from convert.checkpoint import DTYPES, Checkpoint

__all__ = ["Plan", "convert", "info", "plan", "run"]

DEFAULT_SHARD = 5_000_000_000
_SPARE = 1_000_000  # bytes of disk beyond the tensors and the text files: headers, the index


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked and not begun: what it will read, write and cost."""

    checkpoint: Checkpoint
    destination: Path
    dtype: str
    max_shard_size: int

    @property
    def bytes_to_write(self) -> int:
        """Bytes of tensors in the result, all files together."""
        return sum(spec.nbytes for spec in huggingface.target_specs(self.checkpoint, self.dtype))

    @property
    def peak_memory(self) -> int:
        """Bytes for the tensor that needs most: as read, and as cast where the dtypes differ."""
        target = DTYPES[self.dtype]
        return max(
            spec.nbytes + (spec.size * target.itemsize if spec.dtype != target else 0)
            for spec in self.checkpoint.tensors
        )


def read(source: str | os.PathLike[str], *, tokenizer: bool = True) -> Checkpoint:
    """The checkpoint at `source`, its format recognised; only headers are read."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path}: not found")
    if path.is_dir():
        raise ValueError(f"{path}: a directory, expected a GGUF file")
    return gguf.read(path, tokenizer=tokenizer)


def plan(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD,
    tokenizer: bool = True,
) -> Plan:
    """Check a conversion as far as that can be done before it begins.

    Raises ValueError for a source that is damaged or not a Llama, a destination that exists or has
    no parent directory, an unknown dtype, and a disk without the room.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes")
    target = Path(os.path.abspath(destination))
    if os.path.lexists(target):
        raise ValueError(f"{destination}: exists, expected a directory to be made")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: not a directory, expected it to hold {target.name}")
    checkpoint = read(source, tokenizer=tokenizer)
    result = Plan(checkpoint, target, dtype or checkpoint.dtype, max_shard_size)
    needed = (
        result.bytes_to_write + _SPARE + sum(len(t.encode()) for t in checkpoint.files.values())
    )
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(f"{target.parent}: {free} bytes free, expected at least {needed}")
    return result


def run(plan: Plan, progress: Callable[[int], None] | None = None) -> Path:
    """Do what `plan` says; `progress` is told the bytes just written. Returns the destination."""
    huggingface.write(
        plan.checkpoint,
        plan.destination,
        dtype=plan.dtype,
        max_shard_size=plan.max_shard_size,
        progress=progress,
    )
    return plan.destination


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_SHARD,
    tokenizer: bool = True,
) -> Path:
    """Convert the GGUF Llama at `source` into a new Hugging Face directory and return its path.

    `dtype`: float32, bfloat16 or float16; by default the file's own where its matrices share one,
    and float32 for a quantised file. `destination` is either absent or whole, whatever happens.
    Raises ValueError for what the user can mend (see `plan`) and OSError for the disk's faults.
    """
    return run(
        plan(source, destination, dtype=dtype, max_shard_size=max_shard_size, tokenizer=tokenizer)
    )


def info(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a checkpoint: format, parameters, config, dtypes, sizes, tokenizer, notes.

    A tokenizer that cannot be carried over is a note here, not an error.
    """
    try:
        checkpoint = read(source)
    except ValueError as error:
        checkpoint = read(
            source, tokenizer=False
        )  # raises again unless the tokenizer was the fault
        notes: tuple[str, ...] = (str(error), *checkpoint.notes)
    else:
        notes = checkpoint.notes
    return {
        "format": checkpoint.format,
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.tensors),
        "default_dtype": checkpoint.dtype,
        **checkpoint.facts,
        "config": checkpoint.config,
        "files": sorted(checkpoint.files),
        "notes": list(notes),
    }
