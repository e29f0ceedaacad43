"""Write Meta's checkpoints: `params.json` and one `consolidated.00.pth`, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.formats import plain
from convert.formats.directory import write_config_and_companions
from convert.formats.llama_tensors import to_pairs
from convert.formats.meta.params import config_of, params_of
from convert.formats.meta.tensors import EMBEDDING, HEAD, meta_tensors
from convert.formats.meta.tokenizer import MODEL, meta_tokenizer
from convert.formats.torch_files import require_torch
from convert.formats.torch_write import Storage, write_torch_file
from convert.same_function import config_differences
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text

FILE = "consolidated.00.pth"


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be.

    Raises:
        ValueError: a model that Meta's format cannot express, naming the fields: params.json must mean the
            same function as the config. Also where torch is not installed.
    """
    require_torch()
    config = LlamaConfig.from_dict(checkpoint.config)
    try:
        expressible, _ = config_of(
            params_of(config),
            vocab_size=config.vocab_size,
            tied=config.tie_word_embeddings,
            config_json=None,
        )
    except ValueError as error:
        raise ValueError(f"Meta's format cannot hold this model: {error}") from None
    if differences := config_differences(checkpoint.config, expressible.to_dict()):
        raise ValueError(f"Meta's format cannot hold this model: {'; '.join(differences)}")
    return plain.target_specs(checkpoint, dtype)


def losses(checkpoint: Checkpoint) -> list[str]:
    """A tokenizer that Meta's code does not read."""
    if "tokenizer.json" not in checkpoint.files or meta_tokenizer(checkpoint.files) is not None:
        return []
    return ["tokenizer.json cannot be converted to a tokenizer.model and is copied as it is"]


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint` into the new directory `path`; a tied head takes no room.

    Raises:
        OSError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    path.mkdir()
    config = LlamaConfig.from_dict(checkpoint.config)
    table = meta_tensors(config)
    storages = [
        Storage(str(i), spec.dtype, spec.shape) for i, spec in enumerate(checkpoint.tensors)
    ]
    names = [table[spec.name].name for spec in checkpoint.tensors]
    tensors = dict(zip(names, storages, strict=True))
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]

    def parts(number: int) -> Iterator[np.ndarray]:
        spec = checkpoint.tensors[number]
        yield to_pairs(checkpoint.load(spec.name), table[spec.name].heads)

    with (path / FILE).open("w+b") as file:
        write_torch_file(file, FILE.removesuffix(".pth"), tensors, storages, parts, progress)
    write_text(path / "params.json", json.dumps(params_of(config), indent=2) + "\n")
    files = dict(checkpoint.files)
    if (model := meta_tokenizer(files)) is not None:
        files[MODEL] = model
    write_config_and_companions(checkpoint, path, files)
