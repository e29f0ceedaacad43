"""The checkpoint formats there are, and which of them a path is.

To add a format, write a module or package beside this file that provides everything in `Format`, and add it
to `FORMATS`. `--to`, detection, `info`, the proof and the tests of every pair of formats follow from there.
What such a module can build on:

- `convert.checkpoint.Checkpoint`: what `read` returns and `write` takes; Hugging Face's names and shapes
- `plain`: everything but `read` and `write`, for a format that stores each tensor as it is, in one dtype
- `llama_tensors`: the model's names and shapes, renaming, and the order of rows under RoPE
- `directory`: reading and writing the config.json, tokenizer and model card beside the weights
- `convert.companions`: the tokenizer's files

`huggingface.py` is the shortest example, `gguf/` the one that shares least with Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from convert.casting import CastRule
from convert.checkpoint import Checkpoint
from convert.formats import gguf, huggingface, meta, orbax
from convert.record import read_digests
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe


class Format(Protocol):
    """What the module of a format provides."""

    @property
    def TITLE(self) -> str:  # noqa: N802
        """Its name, for people."""

    @property
    def LAYOUT(self) -> str:  # noqa: N802
        """What a checkpoint in it looks like on disk, in a few words, for people."""

    @property
    def DTYPE_NAMES(self) -> tuple[str, ...]:  # noqa: N802
        """What `--dtype` may be when it is written."""

    def recognizes(self, path: Path, /) -> bool:
        """Whether a path looks like one, at a glance."""

    def read(self, path: Path, *, tokenizer: bool = True) -> Checkpoint:
        """The checkpoint at `path`, of which only headers are read.

        Args:
            tokenizer: whether to read it; if not, errors in it do not matter.

        Raises:
            ValueError: one line with everything that is wrong.
        """

    def target_specs(self, checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
        """The tensors as `read` will return them once they are written with `--dtype`.

        Raises:
            ValueError: the format cannot hold this model, or not in this dtype.
        """

    def cast_rule(self, dtype: str | None) -> CastRule:
        """What `--dtype` does to a tensor: `(name, values, dtype of its spec) -> values`."""

    def stored_bytes(self, spec: TensorSpec, dtype: str | None) -> int:
        """Bytes on disk of a tensor of `target_specs`."""

    def losses(self, checkpoint: Checkpoint) -> list[str]:
        """What of the checkpoint, other than tensors, will be lost, in words."""

    def write(self, checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
        """Write to `path`, which does not exist.

        Args:
            checkpoint: its tensors are those of `target_specs`, its dtype is `--dtype`. Call `load` once
                for each of them, in any order, and drop the values before the next call.
            progress: to be called with the number of bytes just written.
        """


FORMATS: dict[str, Format] = {"hf": huggingface, "orbax": orbax, "gguf": gguf, "meta": meta}
"""By what `--to` calls them."""


def recognize(path: Path) -> Format:
    """The format of a path. Raises ValueError where it is none."""
    if not path.exists():
        raise ValueError(f"{path}: not found")
    for format_ in FORMATS.values():
        if format_.recognizes(path):
            return format_
    found = describe(path) if path.is_dir() else "not a checkpoint by itself (try its directory)"
    layouts = "; ".join(f"{format_.TITLE} ({format_.LAYOUT})" for format_ in FORMATS.values())
    raise ValueError(f"{path}: {found}; expected one of: {layouts}")


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The checkpoint at `path`, whatever its format; only headers are read.

    Raises:
        ValueError: one line with everything that is wrong.
    """
    checkpoint = recognize(path).read(path, tokenizer=tokenizer)
    return read_digests(path, checkpoint)


def config_of(path: Path) -> dict[str, Any]:
    """The config.json of a directory whose weights cannot be read; {} if it cannot be read either."""
    try:
        return LlamaConfig.from_pretrained(path).to_dict()
    except ValueError:
        return {}
