"""A conversion: planned, then run a tensor at a time, proved, and only then given its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert import record
from convert.casting import Changes
from convert.checkpoint import Checkpoint, dtype_name
from convert.companions import tokenizer_facts
from convert.estimate import seconds
from convert.formats import huggingface, registry
from convert.formats.registry import FORMATS
from convert.proof import read_back
from convert.verify_logits import Comparison, compare_logits, require_means
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.files.staging import move, staging_in, to_disk

DEFAULT_SHARD = huggingface.DEFAULT_SHARD
_SPARE = 1_000_000  # bytes of disk beyond the tensors and the files beside: headers, the index
_BASE_MEMORY = 600_000_000  # Python, JAX, TensorStore


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked and not begun: what it will read, write and cost."""

    source: Path
    checkpoint: Checkpoint
    destination: Path
    to: str
    """A key of FORMATS."""
    dtype: str | None
    """What is asked of the target's format; None: each tensor's own."""
    specs: tuple[TensorSpec, ...]
    """The tensors as the target's own reader will return them."""
    max_shard_size: int
    verify: bool
    logits: bool

    @property
    def notes(self) -> list[str]:
        """What the user should know before it begins."""
        return [*self.checkpoint.notes, *FORMATS[self.to].losses(self.checkpoint)]

    @property
    def bytes_to_write(self) -> int:
        """Bytes of tensors in the result, all files together."""
        return sum(FORMATS[self.to].stored_bytes(spec, self.dtype) for spec in self.specs)

    @property
    def peak_memory(self) -> int:
        """Bytes that are surely enough: the program, and three times the largest tensor."""
        largest = max(
            max(read.nbytes, written.nbytes)
            for read, written in zip(self.checkpoint.tensors, self.specs, strict=True)
        )
        return _BASE_MEMORY + 3 * largest

    @property
    def seconds(self) -> float:
        """A guess, from what disk and processor do now."""
        return seconds(
            self.destination.parent,
            read=sum(spec.nbytes for spec in self.checkpoint.tensors),
            written=self.bytes_to_write,
            verify=self.verify,
        )


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    destination: Path
    tensors: int
    changed: dict[str, Changes]
    """Tensors with values that the cast changed."""
    verified: bool
    logits: Comparison | None


def plan(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    tokenizer: bool = True,
    verify: bool = True,
    logits: bool = False,
) -> Plan:
    """Check a conversion as far as that can be done before it begins. For the arguments see `convert`.

    Raises ValueError for a source that is damaged or not a Llama, one that the target cannot hold, a
    destination that exists, lies in the source or has no parent directory, an unknown format or dtype,
    and a disk, or for `logits` a memory, without the room.
    """
    target = Path(os.path.abspath(destination))
    to = to or ("gguf" if target.suffix == ".gguf" else "hf")
    if to not in FORMATS:
        raise ValueError(f"to is {to!r}, expected one of {', '.join(FORMATS)}")
    format_ = FORMATS[to]
    dtype = None if dtype is None else dtype_name(str(dtype))
    if dtype is not None and dtype not in format_.DTYPE_NAMES:
        raise ValueError(
            f"dtype is {dtype!r}, expected one of {', '.join(format_.DTYPE_NAMES)} for {format_.TITLE}"
        )
    if max_shard_size is not None and to != "hf":
        raise ValueError(f"max_shard_size is for Hugging Face, expected none for {format_.TITLE}")
    if max_shard_size is not None and max_shard_size <= 0:
        raise ValueError(f"max_shard_size is {max_shard_size}, expected a positive number of bytes")
    path = Path(source)
    if os.path.lexists(target):
        raise ValueError(f"{destination}: exists, expected a name that is free")
    if path.is_dir() and target.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{destination}: lies in {source}, expected a place outside the source")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: not a directory, expected it to hold {target.name}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{target.parent}: no permission to write there")
    checkpoint = registry.read(path, tokenizer=tokenizer)
    if logits:
        require_means(checkpoint)
    chosen = dtype or checkpoint.dtype
    if dtype is None and chosen not in format_.DTYPE_NAMES:
        chosen = None
    result = Plan(
        source=path,
        checkpoint=checkpoint,
        destination=target,
        to=to,
        dtype=chosen,
        specs=tuple(format_.specs(checkpoint, chosen)),
        max_shard_size=max_shard_size or DEFAULT_SHARD,
        verify=verify,
        logits=logits,
    )
    needed = result.bytes_to_write + _SPARE + sum(map(len, checkpoint.files.values()))
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ValueError(f"{target.parent}: {free} bytes free, expected at least {needed}")
    return result


def run(plan: Plan, progress: Callable[[int], None] | None = None) -> Report:
    """Do what `plan` says; `progress` is told the bytes just written, then those just compared."""
    format_, tell = FORMATS[plan.to], progress or (lambda count: None)
    name = plan.destination.name
    rule = format_.rule(plan.dtype)
    options: dict[str, Any] = {"max_shard_size": plan.max_shard_size} if plan.to == "hf" else {}
    asked = replace(plan.checkpoint, dtype=plan.dtype)
    with staging_in(plan.destination.parent, name) as staging:
        place = staging / name
        with record.recording(plan.source, asked, plan.specs, rule) as (
            checkpoint,
            written,
        ):
            format_.write(checkpoint, place, tell, **options)
            records = {name: future.result() for name, future in written.items()}
        if plan.verify:
            read_back(format_.read, place, checkpoint.config, records, tell)
        comparison = None
        if plan.logits:
            written_back = format_.read(place, tokenizer=False)
            comparison = compare_logits(plan.source, plan.checkpoint, written_back, rule)
        facts = {
            "source": plan.checkpoint.format,
            "target": format_.TITLE,
            "dtype": plan.dtype,
            "parameters": plan.checkpoint.parameters,
            "verified": plan.verify,
            "logits": None if comparison is None else comparison._asdict(),
        }
        record.write(record.place(place), facts, records)
        to_disk(staging)  # which the system has been writing to while tensors were compared
        if place.is_file():
            os.replace(record.place(place), record.place(plan.destination))
        move(place, plan.destination)
    changed = {name: each.changes for name, each in records.items() if each.changes is not None}
    return Report(plan.destination, len(records), changed, plan.verify, comparison)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    tokenizer: bool = True,
    verify: bool = True,
    logits: bool = False,
) -> Path:
    """Convert the Llama at `source`, of any known format, into `destination` and return its path.

    Args:
        to: hf, orbax, gguf or meta; by default gguf where `destination` ends so, else hf.
        dtype: float32, bfloat16, float16, float64, or q8_0 for GGUF, in capitals or not, or as formats
            have them (F32, BF16); by default what loses nothing.
        max_shard_size: bytes of a safetensors file.
        tokenizer: whether it travels along; otherwise faults in it do not matter.
        verify: read the result back and compare every tensor, before it has its name.
        logits: compare logits with PyTorch's as well, which takes torch and the model in memory.

    `destination` is either absent or whole, whatever happens. Raises ValueError for what the user can
    mend (see `plan`) and OSError for the disk's faults.
    """
    todo = plan(
        source,
        destination,
        to=to,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        verify=verify,
        logits=logits,
    )
    return run(todo).destination


def info(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a checkpoint: format, parameters, config, dtypes, sizes, tokenizer, notes, faults.

    A fault of the tokenizer, or of weights that a config.json describes, is told, not raised; nothing
    but headers is read. Raises ValueError where nothing can be said.
    """
    path = Path(source)
    faults: list[str] = []
    try:
        checkpoint = registry.read(path)
    except ValueError as error:
        faults.append(str(error))
        try:
            checkpoint = registry.read(path, tokenizer=False)
        except ValueError as second:
            if str(second) != faults[0]:
                faults.append(str(second))
            config = registry.config_of(path)
            return {
                "format": registry.recognise(path).TITLE,
                "config": config,
                "notes": [],
                "faults": faults,
            }
    try:
        tokenizer = tokenizer_facts(checkpoint.files)
    except ValueError as error:
        tokenizer = {}
        faults.append(str(error))
    return {
        "format": checkpoint.format,
        "parameters": checkpoint.parameters,
        "tensors": len(checkpoint.tensors),
        "default_dtype": checkpoint.dtype or "each tensor's own",
        **tokenizer,
        **checkpoint.facts,
        "config": checkpoint.config,
        "files": sorted(checkpoint.files),
        "digests": len(checkpoint.digests),
        "notes": list(checkpoint.notes),
        "faults": faults,
    }
