"""Writing a Hugging Face directory: config.json, safetensors, tokenizer; whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.checkpoint import DTYPES, Checkpoint, cast
from llama_jax.safetensors_write import TensorSpec, write_safetensors
from llama_jax.staging import staged_directory, write_text


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

    with staged_directory(directory, into_existing=False) as partial:
        specs = target_specs(checkpoint, dtype)
        write_safetensors(partial, specs, load, max_shard_size=max_shard_size, progress=progress)
        # transformers 4 reads torch_dtype, 5 reads dtype.
        config = {**checkpoint.config, "torch_dtype": dtype, "dtype": dtype}
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        for name, text in checkpoint.files.items():
            write_text(partial / name, text)
