"""Writing a Hugging Face directory: config.json, safetensors, tokenizer; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from convert.checkpoint import DTYPES, Checkpoint, cast
from llama_jax.safetensors_io import TensorSpec, write_safetensors


def target_specs(checkpoint: Checkpoint, dtype: str) -> list[TensorSpec]:
    """The tensors as they will be written: every one in `dtype`, a key of DTYPES."""
    return [TensorSpec(spec.name, DTYPES[dtype], spec.shape) for spec in checkpoint.tensors]


def write(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    dtype: str,
    max_shard_size: int = 5_000_000_000,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `checkpoint` as the Hugging Face directory `directory`, which must not exist yet.

    One tensor is in memory at a time, in its stored form and in `dtype`. Raises ValueError for a
    tensor that `dtype` cannot hold and OSError for the disk's faults; `directory` is then absent.
    """

    def load(name: str) -> np.ndarray:
        return cast(name, checkpoint.load(name), DTYPES[dtype])

    with _whole(directory) as partial:
        specs = target_specs(checkpoint, dtype)
        write_safetensors(partial, specs, load, max_shard_size=max_shard_size, progress=progress)
        # transformers 4 reads torch_dtype, 5 reads dtype.
        config = {**checkpoint.config, "torch_dtype": dtype, "dtype": dtype}
        _write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        for name, text in checkpoint.files.items():
            _write_text(partial / name, text)


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory` that takes its name at the end, or disappears."""
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if os.path.lexists(directory):  # rename would silently replace an empty directory
            raise FileExistsError(f"{directory} has appeared meanwhile, expected it to be absent")
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
