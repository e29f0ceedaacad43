"""Write a trace from arrays that are in memory."""

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.safetensors_write import TensorSpec, write_file
from llama_jax.files.staging import staged_directory
from parity_tests.traces.names import place, section_of
from parity_tests.traces.trace import FORMAT, MANIFEST

Load = Callable[[], np.ndarray]


def require_new(folder: Path) -> None:
    """Raises ValueError if there is something at `folder`, or no directory for it."""
    if folder.exists():
        raise ValueError(f"{folder}: exists, expected a new folder")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"{folder.parent}: no such directory")


def require_room(folder: Path, size: int) -> None:
    """Raises ValueError if the disk has too little room for `size` bytes."""
    room = shutil.disk_usage(folder.absolute().parent).free
    if size > room:
        raise ValueError(
            f"{folder}: the trace takes {size / 1e9:.2f} GB, and {room / 1e9:.2f} GB are free"
        )


def write_trace(
    folder: Path,
    arrays: Mapping[str, tuple[TensorSpec, Load]],
    manifest: Mapping[str, Any],
    weights: Mapping[str, str],
) -> None:
    """Write arrays by their names in a trace, a file for each section, and the manifest last.

    Args:
        folder: must not exist.
        arrays: dtype and shape of each, and a function that returns its values.
        manifest: further entries of it.
        weights: digests of the parameters, by Hugging Face's names.
    """
    by_section: dict[str, list[str]] = {}
    for name in arrays:
        what = place(name)
        assert what is not None, name
        by_section.setdefault(_section(what.name), []).append(name)
    entries: dict[str, Any] = {}
    with staged_directory(folder, into_existing=False) as staging:
        for index, (section, names) in enumerate(by_section.items()):
            file = f"{index:04d}-{section}.safetensors"
            specs = [arrays[name][0] for name in names]
            write_file(staging / file, specs, lambda name: arrays[name][1]())
            for spec in specs:
                shape, dtype = list(spec.shape), spec.dtype.name
                entries[spec.name] = {"file": file, "shape": shape, "dtype": dtype}
        facts = {
            "format": FORMAT,
            "versions": {"python": platform.python_version()},
            "weights": dict(weights),
            "weights_digest": hashlib.sha256(
                json.dumps(dict(weights), sort_keys=True).encode()
            ).hexdigest(),
        }
        text = json.dumps(facts | dict(manifest) | {"arrays": entries}, indent=1)
        (staging / MANIFEST).write_text(text)


def _section(name: str) -> str:
    return section_of(name.removeprefix("model."))
