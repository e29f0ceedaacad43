"""GGUF files out."""

from collections.abc import Callable
from pathlib import Path

from convert.casting import Rule, casts
from convert.checkpoint import Checkpoint, in_dtype, plain_bytes
from llama_jax.safetensors_write import TensorSpec


def specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be."""
    return in_dtype(checkpoint, dtype)


def rule(dtype: str | None) -> Rule:
    """What becomes of a tensor."""
    return casts(dtype)


stored_bytes = plain_bytes


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write it."""
    raise ValueError("GGUF cannot be written yet")
