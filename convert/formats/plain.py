"""The functions of a format that stores every tensor as it is, in any dtype."""

from __future__ import annotations

from convert.casting import CastRule, cast
from convert.checkpoint import DTYPES, Checkpoint
from llama_jax.checkpoints.safetensors_write import TensorSpec


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """Every tensor in `dtype`, a key of DTYPES; None leaves each its own."""
    return [
        spec if dtype is None else TensorSpec(spec.name, DTYPES[dtype], spec.shape)
        for spec in checkpoint.tensors
    ]


def cast_rule(checkpoint: Checkpoint, dtype: str | None) -> CastRule:
    """Values are cast, whatever `dtype` is."""
    return cast


def stored_bytes(spec: TensorSpec, dtype: str | None) -> int:
    """A tensor takes on disk what it takes in memory."""
    return spec.nbytes


def losses(checkpoint: Checkpoint) -> list[str]:
    """This format loses nothing."""
    return []
