"""What every reader returns and every writer takes: a config, and a stream of named tensors.

A reader is a function `read(path) -> Checkpoint`, a writer a function that takes a Checkpoint; a new
format is one new file with one or both. Names, shapes and row order are Hugging Face's Llama
(`model.layers.0.self_attn.q_proj.weight`, [out, in]), the form that all of them know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.safetensors_read import all_finite
from llama_jax.safetensors_write import TensorSpec

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest in some format; nothing but its headers has been read."""

    format: str
    """Where it comes from, for people: "GGUF v3"."""
    config: dict[str, Any]
    """The content of a Hugging Face `config.json`, without a dtype."""
    tensors: tuple[TensorSpec, ...]
    """Every tensor as `load` returns it, in the model's order."""
    load: Callable[[str], np.ndarray]
    """The values of one tensor, read when called; raises ValueError if they cannot be had."""
    dtype: str
    """The dtype that loses nothing worth keeping: a key of DTYPES."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text files that travel along, by relative path: tokenizer, templates, generation config."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More about the source that `info` shows: stored types, name, licence, tokenizer."""
    notes: tuple[str, ...] = ()
    """What the user should know: something assumed, or something left behind."""

    @property
    def parameters(self) -> int:
        """How many numbers the model has; a tied output projection is not counted twice."""
        return sum(spec.size for spec in self.tensors)


def cast(name: str, values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`values` as `dtype`, rounded to nearest even.

    Raises ValueError when values are not finite, or finite ones would not stay so (float16 ends at
    65504): a model with them computes NaN, and nobody would know why.
    """
    if not all_finite(values):
        count = int(values.size - np.isfinite(values).sum())
        raise ValueError(f"tensor {name}: {count} values are NaN or infinite, expected none")
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(dtype)
    if not all_finite(result):
        count = int(result.size - np.isfinite(result).sum())
        raise ValueError(
            f"tensor {name}: {count} values overflow {dtype}, "
            f"largest magnitude {float(np.abs(values).max()):g}; choose bfloat16 or float32"
        )
    return result
