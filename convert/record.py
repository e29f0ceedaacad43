"""`conversion.json`: what was converted from what, and the SHA-256 of every tensor.

It lies in the directory that was made, or beside the file. A checkpoint that has one is checked against
it whenever it is read, so that damage within a tensor does not travel on.
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

from convert.casting import Changes, Rule, changes
from convert.checkpoint import Checkpoint
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.files.json_object import read_json_object

FILE = "conversion.json"
_SHA256 = re.compile("[0-9a-f]{64}")


class Record(NamedTuple):
    """One tensor as it was written."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    changes: Changes | None


def place(path: Path) -> Path:
    """Where the record of a converted directory or file is."""
    return path / FILE if path.is_dir() else path.with_name(f"{path.name}.{FILE}")


def digest(values: np.ndarray) -> str:
    """SHA-256 of the values' bytes in C order, as hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()


def read_digests(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the digests of its record, where it has one.

    Raises ValueError for a damaged record, or one of other tensors.
    """
    file = place(path)
    if not file.exists():
        return checkpoint
    tensors = read_json_object(file).get("tensors")
    try:
        found = {name: entry["sha256"] for name, entry in tensors.items()}  # type: ignore[union-attr]
        sound = all(isinstance(each, str) and _SHA256.fullmatch(each) for each in found.values())
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: found no digests, expected one for each tensor") from None
    names = {spec.name for spec in checkpoint.tensors}
    if other := sorted(names ^ found.keys()):
        raise ValueError(
            f"{file}: is of other tensors than the weights beside it ({other[0]}, {len(other)} in all); "
            "remove it if they were changed on purpose"
        )
    return replace(checkpoint, digests=found)


@contextmanager
def recording(
    source: Path,
    checkpoint: Checkpoint,
    specs: Sequence[TensorSpec],
    rule: Rule,
) -> Iterator[tuple[Checkpoint, dict[str, Future[Record]]]]:
    """`checkpoint` with every tensor passed through `rule` as it is loaded, and the records of those.

    While a tensor is written, another thread makes its record and a third reads the one that follows; no
    more than these three are held. Raises ValueError, on a later `load` or from the future, where a tensor
    is not what its digest says.
    """
    dtypes = {spec.name: spec.dtype for spec in specs}
    follows = {one.name: other.name for one, other in pairwise(specs)}
    records: dict[str, Future[Record]] = {}
    ahead: dict[str, Future[tuple[np.ndarray, bool, Changes | None]]] = {}
    newest: list[Future[Record]] = []

    def require(name: str, sha256: str) -> None:
        expected = checkpoint.digests.get(name, sha256)
        if sha256 != expected:
            raise ValueError(
                f"{source}: tensor {name}: its values are not those that {place(source).name} has the "
                f"digest of: damaged, or changed since (then remove {place(source).name})"
            )

    def fetch(name: str) -> tuple[np.ndarray, bool, Changes | None]:
        values = checkpoint.load(name)
        try:
            result = rule(name, values, dtypes[name])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if result is values:
            return result, True, None
        # here, so that the source's values are not held while those of the target are written
        if name in checkpoint.digests:
            require(name, digest(values))
        return result, False, changes(values, result)

    def record(name: str, result: np.ndarray, as_read: bool, changed: Changes | None) -> Record:
        sha256 = digest(result)
        if as_read:
            require(name, sha256)
        return Record(str(result.dtype), result.shape, sha256, changed)

    def load(name: str) -> np.ndarray:
        while newest:
            newest.pop().result()
        fetched = ahead.pop(name, None)
        result, as_read, changed = fetch(name) if fetched is None else fetched.result()
        records[name] = digesting.submit(record, name, result, as_read, changed)
        newest.append(records[name])
        ahead.clear()
        if name in follows:
            ahead[follows[name]] = reading.submit(fetch, follows[name])
        return result

    with ThreadPoolExecutor(1) as digesting, ThreadPoolExecutor(1) as reading:
        yield replace(checkpoint, tensors=tuple(specs), load=load, digests={}), records


def write(path: Path, facts: dict[str, Any], records: dict[str, Record]) -> None:
    """Write the record of a conversion to `path`.

    Args:
        facts: of the whole conversion: formats, dtype, what was verified.
    """
    tensors = {
        name: {"dtype": each.dtype, "shape": list(each.shape), "sha256": each.sha256}
        | ({} if each.changes is None else {"changed": each.changes._asdict()})
        for name, each in records.items()
    }
    path.write_text(json.dumps({**facts, "tensors": tensors}, indent=1) + "\n", encoding="utf-8")
