"""The checkpoint formats there are, and which of them a path is.

To add a format, write a module or package beside this file that provides the functions of `Format`, and add
it to `FORMATS`. The command line, detection, `info`, verification and the tests of every pair of formats
follow from there. A format without `dtypes` is only read, and provides the functions of `Reader` alone.
What such a module can build on:

- `convert.checkpoint.Checkpoint`: what `read` returns and `write` takes; Hugging Face's names and shapes
- `plain`: all functions but `read`, `recognizes` and `write`, for formats that store each tensor as it is
- `llama_tensors`: the model's names and shapes, renaming, and the order of rows under RoPE
- `directory`: the config.json, tokenizer and model card in a directory beside the weights
- `trees`: Orbax trees by a map of names, a TOML file
- `convert.companions`: the files of a tokenizer

`huggingface.py` is the shortest example, `gguf/` the one that has least in common with Hugging Face.

Formats are imported when they are used, for they import large libraries and `--help` needs none.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from convert.casting import CastRule
    from convert.checkpoint import Checkpoint
    from convert.renaming import Rename
    from llama_jax.checkpoints.safetensors_write import TensorSpec


class Reader(Protocol):
    """The functions that the module of every format provides."""

    def recognizes(self, path: Path, /) -> bool:
        """Whether a path looks like one, at a glance."""

    def read(self, path: Path, *, tokenizer: bool = True) -> Checkpoint:
        """The checkpoint at `path`, of which only headers are read.

        Args:
            tokenizer: whether to read it; if not, errors in it do not matter.

        Raises:
            ValueError: one line with everything that is wrong.
        """


class Format(Reader, Protocol):
    """The functions of a format that can be written as well."""

    def target_specs(self, checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
        """The tensors as `read` will return them once they are written with `--dtype`.

        Raises:
            ValueError: the format cannot hold this model, or not in this dtype.
        """

    def cast_rule(self, checkpoint: Checkpoint, dtype: str | None) -> CastRule:
        """What writing with `--dtype` does to a tensor: `(name, values, dtype of its spec) -> values`."""

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


@dataclass(frozen=True)
class Entry:
    """One format of the registry."""

    title: str
    """Its name, for people."""
    layout: str
    """What a checkpoint in it looks like on disk, in a few words, for people."""
    dtypes: tuple[str, ...]
    """What `--dtype` may be when it is written; none for a format that is only read."""
    module_name: str
    quantized: tuple[str, ...] = ()
    """What else it may be: dtypes of projections alone, while all else keeps its own."""

    @property
    def choices(self) -> tuple[str, ...]:
        """All that `--dtype` may be."""
        return (*self.dtypes, *self.quantized)

    @property
    def reader(self) -> Reader:
        """Its functions for reading."""
        return cast("Reader", importlib.import_module(self.module_name))

    @property
    def module(self) -> Format:
        """All its functions; of a format that is not only read."""
        assert self.dtypes
        return cast("Format", importlib.import_module(self.module_name))


_PLAIN_DTYPES = ("float32", "bfloat16", "float16", "float64")

FORMATS: dict[str, Entry] = {
    "hf": Entry(
        "Hugging Face",
        "a directory with *.safetensors or pytorch_model*.bin",
        _PLAIN_DTYPES,
        "convert.formats.huggingface",
        quantized=("fp8",),
    ),
    "orbax": Entry(
        "Orbax",
        "a run of python -m train, one of its checkpoints/STEP, or a directory made with --to orbax",
        _PLAIN_DTYPES,
        "convert.formats.orbax",
    ),
    "maxtext": Entry(
        "MaxText",
        "a run, one of its checkpoints/STEP, or its items, beside a config.yml or config.json",
        _PLAIN_DTYPES,
        "convert.formats.maxtext",
    ),
    "gguf": Entry(
        "GGUF",
        "a file of the llama architecture, quantized or not; of a split file, any piece",
        ("float32", "bfloat16", "float16", "q8_0"),
        "convert.formats.gguf",
    ),
    "meta": Entry(
        "Meta",
        "a directory with params.json and consolidated.*.pth",
        _PLAIN_DTYPES,
        "convert.formats.meta",
    ),
    "dcp": Entry(
        "torch distributed",
        "a directory with .metadata and *.distcp, of torchtitan, FSDP or Accelerate",
        _PLAIN_DTYPES,
        "convert.formats.dcp",
    ),
    "litgpt": Entry(
        "LitGPT",
        "a directory with lit_model.pth and model_config.yaml",
        _PLAIN_DTYPES,
        "convert.formats.litgpt",
    ),
    "state_dict": Entry(
        "PyTorch state dict",
        "a .pt, .pth or .bin file, in torchtitan's or Hugging Face's names",
        (),
        "convert.formats.state_dict",
    ),
    "flax": Entry(
        "Flax",
        "a directory with flax_model.msgpack, or with EasyLM's streaming_params, or such a file",
        (),
        "convert.formats.flax",
    ),
}
"""By their short names."""


def writable() -> list[str]:
    """What `--to` may be."""
    return [name for name, entry in FORMATS.items() if entry.dtypes]


if TYPE_CHECKING:
    from convert.formats import (
        dcp,
        flax,
        gguf,
        huggingface,
        litgpt,
        maxtext,
        meta,
        orbax,
        state_dict,
    )

    _PROVIDE_ALL_FUNCTIONS: list[Format] = [huggingface, orbax, maxtext, gguf, meta, dcp, litgpt]
    _READ: list[Reader] = [flax, state_dict]


def recognize(path: Path) -> Entry:
    """The format of a path. Raises ValueError where it is none."""
    from convert.formats.trees.locate import find_tree
    from llama_jax.files.foreign_weights import describe

    if not path.exists():
        raise ValueError(f"{path}: not found")
    for entry in FORMATS.values():
        if entry.reader.recognizes(path):
            return entry
    if (tree := find_tree(path)) is not None:
        raise ValueError(
            f"{tree}: an Orbax tree without MaxText's names; give them with --map FILE (see "
            "docs/conversion.md)"
        )
    what = describe(path) if path.is_dir() else "not a checkpoint by itself (try its directory)"
    layouts = "; ".join(f"{entry.title} ({entry.layout})" for entry in FORMATS.values())
    raise ValueError(f"{path}: {what}; expected one of: {layouts}")


RENAMED = ("hf", "dcp", "state_dict")
"""Formats whose `read` takes `rename`: those that hold tensors by any names."""


def read(
    path: Path,
    *,
    tokenizer: bool = True,
    name_map: Path | None = None,
    rope: str | None = None,
    rename: Rename | None = None,
) -> Checkpoint:
    """The checkpoint at `path`, whatever its format; only headers are read.

    Args:
        tokenizer: whether to read it.
        name_map: TOML file with a map of names, for an Orbax checkpoint of another program.
        rope: order of the rows of queries and keys, where an Orbax checkpoint does not tell it.
        rename: what is done to the stored names first, in a format of RENAMED.

    Raises:
        ValueError: one line with everything that is wrong.
    """
    from convert.record import read_digests

    if name_map is not None:
        from convert.formats.trees.name_map import read_name_map
        from convert.formats.trees.read import read as read_tree

        if not path.exists():
            raise ValueError(f"{path}: not found")
        if rename is not None:
            raise ValueError("rename: not together with a map of names, which can do the same")
        checkpoint = read_tree(path, read_name_map(name_map), rope=rope, tokenizer=tokenizer)
        return read_digests(path, checkpoint)
    entry = recognize(path)
    if rope is not None and entry is not FORMATS["maxtext"]:
        raise ValueError(f"rope is for MaxText and maps of names only, not for {entry.title}")
    if rename is not None and entry not in [FORMATS[name] for name in RENAMED]:
        titles = ", ".join(FORMATS[name].title for name in RENAMED)
        raise ValueError(f"{path}: rename is for {titles}, not for {entry.title}")
    options = {"rope": rope, "rename": rename}
    # not in the protocol: each is for few formats
    read_format: Any = entry.reader.read
    chosen = {name: value for name, value in options.items() if value is not None}
    return read_digests(path, read_format(path, tokenizer=tokenizer, **chosen))


def config_of(path: Path) -> dict[str, Any]:
    """The config.json of a directory whose weights cannot be read; {} if it cannot be read either."""
    from llama_jax.config import LlamaConfig

    try:
        return LlamaConfig.from_pretrained(path).to_dict()
    except ValueError:
        return {}
