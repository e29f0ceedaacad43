"""What every reader returns and every writer takes: a config, and a stream of named tensors.

Names, shapes and the order of rows are those of Hugging Face's Llama
(`model.layers.0.self_attn.q_proj.weight`, [out, in]), which every other format can be converted to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoints.safetensors_write import TensorSpec

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class Checkpoint:
    """A stored model, in any format; only its headers have been read."""

    format: str
    """The format it comes from, for people: "GGUF v3"."""
    config: dict[str, Any]
    """The content of a Hugging Face `config.json`, without a dtype."""
    tensors: tuple[TensorSpec, ...]
    """Every tensor as `load` returns it, in the order in which it is read fastest."""
    load: Callable[[str], np.ndarray]
    """The values of one tensor, read when called; raises ValueError if they cannot be read."""
    dtype: str | None
    """Of a source, the dtype that loses nothing worth keeping, a key of DTYPES; of what a writer gets, the
    one to write. None: each tensor's own."""
    weight_files: tuple[Path, ...] = ()
    """The files that `load` reads, where they are known."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that go with the weights, by name: tokenizer, templates, generation config."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what `load` must return, by tensor, where it was recorded when that was written."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More about the source that `info` shows: stored types, name, license, tokenizer."""
    notes: tuple[str, ...] = ()
    """What the user should know: something assumed, or something left behind."""

    @property
    def parameters(self) -> int:
        """How many parameters the model has; a tied output projection is not counted twice."""
        return sum(spec.size for spec in self.tensors)


_OTHER_NAMES = {
    **dict.fromkeys(("f32", "fp32", "float"), "float32"),
    **dict.fromkeys(("bf16",), "bfloat16"),
    **dict.fromkeys(("f16", "fp16", "half"), "float16"),
    **dict.fromkeys(("f64", "fp64", "double"), "float64"),
}


def dtype_name(text: str) -> str:
    """A dtype's name as `--dtype` takes it, from any that formats and `info` use.

    A text that is no dtype is returned in lower case.

    >>> [dtype_name(text) for text in ("F32", "BF16", "torch.float16", "Q8_0")]
    ['float32', 'bfloat16', 'float16', 'q8_0']
    """
    name = text.strip().lower().removeprefix("torch.")
    return _OTHER_NAMES.get(name, name)


def common_dtype(specs: Sequence[TensorSpec]) -> str | None:
    """The dtype that all tensors share, as a key of DTYPES; None where they differ."""
    dtypes = {spec.dtype for spec in specs}
    return next((name for name, dtype in DTYPES.items() if dtypes == {dtype}), None)
