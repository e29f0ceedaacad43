"""Traces on disk: what a program computed, as safetensors with a manifest; see `record_torch.py`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoints.safetensors_read import (
    FLOAT_DTYPES,
    STORED_DTYPES,
    StoredTensor,
    read_array,
    read_header,
)
from llama_jax.formatting import summarize
from parity_tests.traces.names import INPUTS, Kind, place

FORMAT = 1
MANIFEST = "manifest.json"


class Trace(NamedTuple):
    """A recording; no values are read yet.

    Attributes:
        folder: where it is.
        manifest: what it says of model, machine and precision.
        stored: the file and offset of each array, by its name.
    """

    folder: Path
    manifest: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]

    def read(self, array: str) -> np.ndarray:
        """The values of an array, in their own dtype."""
        return read_array(self.stored[array])

    def named(self, kind: Kind) -> dict[str, str]:
        """The arrays of a kind: what they are of -> their names."""
        places = {array: place(array) for array in self.stored}
        return {p.name: array for array, p in places.items() if p is not None and p.kind == kind}

    def inputs(self) -> dict[str, np.ndarray]:
        """What the model was called with: `input_ids` and perhaps others of `INPUTS`, [B, T]."""
        return {name: self.read(name) for name in INPUTS if name in self.stored}


def open_trace(folder: Path) -> Trace:
    """Read a trace's manifest and the headers of its files.

    Raises:
        ValueError: in one line: no trace, an unfinished one, a manifest that is damaged or without digests,
            files that are missing or truncated, or arrays that are not as the manifest says or not numbers
            of the right kind.
    """
    manifest = _manifest(folder)
    listed: Mapping[str, Any] = manifest["arrays"]
    found: dict[str, StoredTensor] = {}
    for file in sorted({entry["file"] for entry in listed.values()}):
        if Path(file).name != file:
            raise ValueError(f"{folder}: {MANIFEST} names the file {file!r}, outside the folder")
        try:
            found |= {tensor.name: tensor for tensor in read_header(folder / file)}
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    problems = [f"{name}: missing" for name in listed if name not in found]
    for name, entry in listed.items():
        if name in found and list(found[name].shape) != entry["shape"]:
            problems.append(f"{name}: found {list(found[name].shape)}, expected {entry['shape']}")
    problems += [
        f"{name}: found {STORED_DTYPES[tensor.dtype]}, expected {expected}"
        for name, tensor in found.items()
        if name in listed and (expected := _expected_dtype(name, tensor.dtype))
    ]
    unknown = [name for name in listed if place(name) is None]
    problems += [f"{name}: not the name of an array of a Llama" for name in unknown]
    if "input_ids" not in listed:
        problems.append("input_ids: missing")
    if problems:
        raise ValueError(summarize(str(folder), problems, limit=3))
    return Trace(folder, manifest, {name: found[name] for name in listed})


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such trace")
    if not path.is_file():
        raise ValueError(
            f"{folder}: found no {MANIFEST}: not a trace, or its recording did not finish"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{path}: found format {found!r}, expected {FORMAT}")
    arrays = manifest.get("arrays")
    shaped = isinstance(arrays, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("shape"), list)
        for entry in arrays.values()
    )
    if not shaped:
        raise ValueError(f"{path}: arrays: expected a file and a shape for each")
    for key in ("precision", "weights"):
        if not isinstance(manifest.get(key), dict):
            raise ValueError(f"{path}: {key}: missing; which model was recorded cannot be told")
    for key in ("shape", "config", "optimizer"):
        if not isinstance(manifest.get(key) or {}, dict):
            raise ValueError(f"{path}: {key}: expected an object")
    if not manifest["weights"]:
        raise ValueError(f"{path}: weights: no digest of any; which model was recorded is unknown")
    return manifest


def _expected_dtype(array: str, dtype: str) -> str | None:
    """What the array should be of, if it is not."""
    if array == "attention_mask":  # any numbers, 0 for hidden
        return None
    if array in INPUTS:
        return None if STORED_DTYPES[dtype].kind in "iu" else "integers"
    return None if dtype in FLOAT_DTYPES else "float64, float32, float16 or bfloat16"


def digest(values: np.ndarray) -> str:
    """SHA-256 of values as float32 (float64 of float64), so that their dtype makes no difference."""
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    return hashlib.sha256(np.ascontiguousarray(values, dtype).data).hexdigest()
