"""The formats, and which of them a path is.

A format is one module: `recognises` and `read` make it a source, `specs` and `write` a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from convert.casting import Rule
from convert.checkpoint import Checkpoint
from convert.formats import huggingface, orbax
from convert.formats.gguf import read as gguf
from convert.formats.meta import read as meta
from convert.record import read_digests
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.foreign_weights import describe


class Format(Protocol):
    """What the module of a format has."""

    @property
    def TITLE(self) -> str:  # noqa: N802
        """Its name, for people."""

    @property
    def DTYPE_NAMES(self) -> Sequence[str]:  # noqa: N802
        """What `--dtype` may be when it is written."""

    @property
    def recognises(self) -> Callable[[Path], bool]:
        """Whether a path looks like one, at a glance."""

    @property
    def read(self) -> Callable[..., Checkpoint]:
        """`read(path, *, tokenizer=True)`: headers only; ValueError for everything that is wrong."""

    @property
    def specs(self) -> Callable[[Checkpoint, str | None], list[TensorSpec]]:
        """The tensors as its own reader will return them, given `--dtype`."""

    @property
    def rule(self) -> Callable[[str | None], Rule]:
        """What `--dtype` does to a tensor: `(name, values, dtype of its spec) -> values`."""

    @property
    def stored_bytes(self) -> Callable[[TensorSpec, str | None], int]:
        """Bytes that a tensor of `specs` takes on disk."""

    @property
    def losses(self) -> Callable[[Checkpoint], list[str]]:
        """What will be left behind, in words."""

    @property
    def write(self) -> Callable[..., None]:
        """`write(checkpoint, path, progress)`: to a path that does not exist; tells the bytes just written.

        `checkpoint.load` is called once for each tensor, in any order, and returns what `specs` said;
        `checkpoint.dtype` is what `--dtype` was.
        """


FORMATS: dict[str, Format] = {"hf": huggingface, "orbax": orbax, "gguf": gguf, "meta": meta}


def recognise(path: Path) -> Format:
    """The format of a path. Raises ValueError where it is none."""
    if not path.exists():
        raise ValueError(f"{path}: not found")
    for format_ in FORMATS.values():
        if format_.recognises(path):
            return format_
    found = describe(path) if path.is_dir() else "a file that is none; perhaps its directory"
    raise ValueError(
        f"{path}: {found}; expected the weights of Hugging Face (a directory with *.safetensors or *.bin), "
        "Orbax (a directory), Meta (a directory with consolidated.*.pth) or GGUF (a file)"
    )


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The checkpoint at `path`, its format recognised; only headers are read.

    Raises ValueError for everything that is wrong with it.
    """
    checkpoint = recognise(path).read(path, tokenizer=tokenizer)
    return read_digests(path, checkpoint)


def config_of(path: Path) -> dict[str, Any]:
    """The config.json of a directory whose weights cannot be read; {} where that cannot either."""
    try:
        return LlamaConfig.from_pretrained(path).to_dict()
    except ValueError:
        return {}
