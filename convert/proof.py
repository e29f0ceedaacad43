"""Verification of a conversion: the output is read back, and every tensor is compared by its digest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.record import Record, digest
from convert.same_function import config_differences


def read_back(
    read: Callable[..., Checkpoint],
    path: Path,
    config: Mapping[str, Any],
    records: Mapping[str, Record],
    progress: Callable[[int], None],
) -> None:
    """Compare the checkpoint at `path` with what was to be written.

    Args:
        read: the format's reader, the one that a later conversion from `path` would use.
        config: the config.json that was to be written.
        records: dtype, shape and digest of every tensor, made while it was written.
        progress: is called with the number of bytes just compared.

    Raises:
        ValueError: another config, other tensors, or a tensor of another shape, dtype or value.
    """
    written = read(path, tokenizer=False)
    if differences := config_differences(written.config, config):
        raise ValueError(f"{path}: was read back with {'; '.join(differences)}")
    names = [spec.name for spec in written.tensors]
    if unmatched := sorted(set(names) ^ records.keys()):
        raise ValueError(f"{path}: was read back with other tensors: {', '.join(unmatched[:5])}")
    with ThreadPoolExecutor(1) as pool:
        # one tensor is digested while the next is read
        pending: tuple[str, Future[str]] | None = None
        for name in names:
            values = written.load(name)
            record = records[name]
            if (str(values.dtype), values.shape) != (record.dtype, record.shape):
                raise ValueError(
                    f"{path}: tensor {name} was read back as {values.dtype}{list(values.shape)}, "
                    f"expected {record.dtype}{list(record.shape)}"
                )
            if pending is not None:
                _require_equal(path, *pending, records)
            pending = name, pool.submit(digest, values)
            progress(values.nbytes)
        if pending is not None:
            _require_equal(path, *pending, records)


def _require_equal(
    path: Path, name: str, sha256: Future[str], records: Mapping[str, Record]
) -> None:
    if sha256.result() != records[name].sha256:
        raise ValueError(
            f"{path}: tensor {name} was read back with different values than were written; "
            "check the disk, and report a bug if it is healthy"
        )
