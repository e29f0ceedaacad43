"""`conversion.json`: what was converted from what, and the SHA-256 of every tensor.

It is in the directory that was written, or beside the file. A checkpoint that has one is checked against it
whenever it is read, so that damage within a tensor is not passed on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.casting import CastRule, Changes, changes
from convert.checkpoint import Checkpoint
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.files.json_object import read_json_object
from llama_jax.files.page_cache import forgetting
from llama_jax.files.remote import is_remote

FILE = "conversion.json"
_SHA256 = re.compile("[0-9a-f]{64}")


class Record(NamedTuple):
    """One tensor as it was written."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    changes: Changes | None


def record_path(path: Path) -> Path:
    """Where the record of a converted directory or file is.

    >>> record_path(Path("model.gguf")).name
    'model.gguf.conversion.json'
    """
    return path / FILE if path.is_dir() else path.with_name(f"{path.name}.{FILE}")


def digest(values: np.ndarray) -> str:
    """SHA-256 of the values' bytes in C order, as hexadecimal digits.

    >>> digest(np.zeros(2, np.float32))[:16]
    'af5570f5a1810b7a'
    """
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()


def read_digests(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the digests of its record, where it has one.

    Raises:
        ValueError: a damaged record, or one of other tensors.
    """
    file = record_path(path)
    if not file.exists():
        return checkpoint
    digests = _digests(read_json_object(file).get("tensors"))
    if digests is None:
        raise ValueError(f"{file}: has no SHA-256 for each tensor; remove it to read without it")
    names = {spec.name for spec in checkpoint.tensors}
    if unmatched := sorted(names ^ digests.keys()):
        raise ValueError(
            f"{file}: does not have the tensors of the weights beside it ({unmatched[0]}, "
            f"{len(unmatched)} in all); remove it if the weights were changed on purpose"
        )
    return replace(checkpoint, digests=digests)


def _digests(tensors: Any) -> dict[str, str] | None:
    """The SHA-256 of every tensor in a record; None where it is not one."""
    if not isinstance(tensors, dict):
        return None
    digests = {}
    for name, entry in tensors.items():
        sha256 = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            return None
        digests[name] = sha256
    return digests


def checked(source: Path, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` whose `load` compares each tensor with its digest, where it has one."""

    def load(name: str) -> np.ndarray:
        values = checkpoint.load(name)
        if name in checkpoint.digests:
            _require_digest(source, checkpoint, name, digest(values))
        return values

    return replace(checkpoint, load=load, digests={})


def _require_digest(source: Path, checkpoint: Checkpoint, name: str, sha256: str) -> None:
    if sha256 != checkpoint.digests.get(name, sha256):
        file = record_path(source).name
        raise ValueError(
            f"{source}: tensor {name}: its SHA-256 is not the one in {file}: "
            f"damaged, or changed since (then remove {file})"
        )


@contextmanager
def recording(
    source: Path,
    checkpoint: Checkpoint,
    specs: Sequence[TensorSpec],
    cast_rule: CastRule,
) -> Iterator[tuple[Checkpoint, dict[str, Future[Record]]]]:
    """`checkpoint` with every tensor passed through `cast_rule` as it is loaded, and the records of those.

    While a tensor is written, another thread makes its record and a third reads the next one; no more than
    these three are held.

    Args:
        specs: the tensors as they are to be written, in the order in which they will be.

    Raises:
        ValueError: on a later `load`, or from a future, where a tensor is not what its digest says.
    """
    dtypes = {spec.name: spec.dtype for spec in specs}
    next_name = {spec.name: following.name for spec, following in pairwise(specs)}
    records: dict[str, Future[Record]] = {}
    prefetched: dict[str, Future[_Loaded]] = {}
    unchecked: list[Future[Record]] = []

    def require(name: str, sha256: str) -> None:
        _require_digest(source, checkpoint, name, sha256)

    local = [file for file in checkpoint.weight_files if not is_remote(file) and file.exists()]
    forget = forgetting(lambda: local, sum(file.stat().st_size for file in local))

    def fetch(name: str) -> _Loaded:
        values = checkpoint.load(name)
        forget(values.nbytes)
        try:
            result = cast_rule(name, values, dtypes[name])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if result is values:
            return _Loaded(result, cast=False, changes=None)
        # here, so that the source's values are not held while those of the target are written
        if name in checkpoint.digests:
            require(name, digest(values))
        return _Loaded(result, cast=True, changes=changes(values, result))

    def record(name: str, loaded: _Loaded) -> Record:
        sha256 = digest(loaded.values)
        if not loaded.cast:
            require(name, sha256)
        return Record(str(loaded.values.dtype), loaded.values.shape, sha256, loaded.changes)

    def load(name: str) -> np.ndarray:
        while unchecked:
            unchecked.pop().result()
        future = prefetched.pop(name, None)
        loaded = fetch(name) if future is None else future.result()
        records[name] = digesting.submit(record, name, loaded)
        unchecked.append(records[name])
        prefetched.clear()
        if name in next_name:
            prefetched[next_name[name]] = reading.submit(fetch, next_name[name])
        return loaded.values

    with ThreadPoolExecutor(1) as digesting, ThreadPoolExecutor(1) as reading:
        yield replace(checkpoint, tensors=tuple(specs), load=load, digests={}), records


class _Loaded(NamedTuple):
    """A tensor as it is to be written."""

    values: np.ndarray
    cast: bool
    changes: Changes | None


def write(path: Path, facts: dict[str, Any], records: dict[str, Record]) -> None:
    """Write the record of a conversion to `path`.

    Args:
        facts: of the conversion: formats, dtype, what was verified.
        records: of its tensors, by name.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        tensors[name] = {
            "dtype": record.dtype,
            "shape": list(record.shape),
            "sha256": record.sha256,
        }
        if record.changes is not None:
            tensors[name]["changed"] = record.changes._asdict()
    path.write_text(json.dumps({**facts, "tensors": tensors}, indent=1) + "\n", encoding="utf-8")
