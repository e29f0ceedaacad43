"""Token files as other programs write them, from their definitions."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np

Documents = list[list[int]]


def megatron(
    prefix: Path,
    documents: Documents,
    dtype: str = "uint16",
    sequences: int = 1,
    modes: bool = False,
) -> Path:
    """What `IndexedDatasetBuilder` of Megatron writes; each document is `sequences` of its sequences."""
    codes = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]
    parts = [np.array_split(np.asarray(ids, dtype), sequences) for ids in documents]
    flat = [part for document in parts for part in document]
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"".join(part.tobytes() for part in flat))
    size = np.dtype(dtype).itemsize
    lengths = [len(part) for part in flat]
    pointers = [0, *itertools.accumulate(length * size for length in lengths)][:-1]
    starts = [sequences * number for number in range(len(documents) + 1)]
    prefix.with_name(f"{prefix.name}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", codes.index(dtype) + 1)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(starts))
        + np.array(lengths, np.int32).tobytes()
        + np.array(pointers, np.int64).tobytes()
        + np.array(starts, np.int64).tobytes()
        + (np.zeros(len(lengths), np.int8).tobytes() if modes else b"")
    )
    return prefix


def llm_c(path: Path, ids: list[int], model: str = "gpt-2", **header: int) -> Path:
    """What `write_datafile` of llm.c writes."""
    magic, version, dtype = {
        "gpt-2": (20240520, 1, np.uint16),
        "llama-3": (20240801, 7, np.uint32),
    }[model]
    numbers = np.zeros(256, np.int32)
    numbers[:3] = (
        header.get("magic", magic), header.get("version", version), header.get("count", len(ids)),
    )  # fmt: skip
    path.write_bytes(numbers.tobytes() + np.array(ids, dtype).tobytes())
    return path


def bare(path: Path, ids: list[int], dtype: str = "uint16") -> Path:
    """What nanoGPT's prepare.py writes."""
    np.array(ids, dtype).tofile(path)
    return path


def flat(documents: Documents) -> list[int]:
    return [token for document in documents for token in document]
