"""Write LitGPT's checkpoints, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from convert.checkpoint import Checkpoint
from convert.formats import plain
from convert.formats.directory import write_config_and_companions
from convert.formats.litgpt.config import FILE, config_of, fields_of
from convert.formats.litgpt.read import WEIGHTS
from convert.formats.litgpt.tensors import EMBEDDING, HEAD, place_of
from convert.formats.torch_files import require_torch
from convert.formats.torch_write import Storage, write_torch_file
from convert.same_function import config_differences
from llama_jax.checkpoints.dtypes import widest
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be, those that are fused next to each other and of one dtype, the widest.

    Raises:
        ValueError: a model that LitGPT's config cannot express, naming the fields. Also where torch is not
            installed.
    """
    require_torch()
    config = LlamaConfig.from_dict(checkpoint.config)
    try:
        expressible = config_of(
            fields_of(config, ""), vocab_size=config.vocab_size, tied=config.tie_word_embeddings
        )
    except ValueError as error:
        raise ValueError(f"LitGPT cannot hold this model: {error}") from None
    if differences := config_differences(expressible.to_dict(), checkpoint.config):
        raise ValueError(f"LitGPT cannot hold this model: {'; '.join(differences)}")
    members = _members(plain.target_specs(checkpoint, dtype))
    return [
        replace(spec, dtype=widest({each.dtype for each in specs}))
        for specs in members.values()
        for spec in specs
    ]


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint` into the new directory `path`; a tied head takes no room.

    Raises:
        OSError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    path.mkdir()
    config = LlamaConfig.from_dict(checkpoint.config)
    members = _members(list(checkpoint.tensors))
    storages, tensors = [], {}
    for number, (name, specs) in enumerate(members.items()):
        rows = sum(spec.shape[0] for spec in specs)
        storages.append(Storage(str(number), specs[0].dtype, (rows, *specs[0].shape[1:])))
        tensors[name] = storages[-1]
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    in_order = list(members.values())

    def parts(number: int) -> Iterator[np.ndarray]:
        for spec in in_order[number]:
            yield checkpoint.load(spec.name)

    with (path / WEIGHTS).open("w+b") as file:
        write_torch_file(file, "lit_model", tensors, storages, parts, progress)
    name = str(checkpoint.facts.get("name") or "Llama")
    write_text(path / FILE, yaml.safe_dump(fields_of(config, name)))
    write_config_and_companions(checkpoint, path)


def _members(specs: list[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """The tensors that make up each of LitGPT's, in order."""
    members: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        members.setdefault(place_of(spec.name).name, []).append(spec)
    for each in members.values():
        each.sort(key=lambda spec: place_of(spec.name).part or 0)
    return members
