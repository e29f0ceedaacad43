"""Hugging Face directories: config.json, safetensors (one or several) or `.bin` files, a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert.casting import casts
from convert.checkpoint import (
    DTYPES,
    Checkpoint,
    common_dtype,
    in_dtype,
    no_losses,
    plain_bytes,
)
from convert.companions import read_companions, require_inside, write_companions
from convert.formats.torch_files import WHOLE_NOTE, TorchFile, open_torch_file
from convert.model_card import card_facts
from llama_jax.checkpoints.fit import Rows, Weights, fit, open_weights, read_index, read_rows
from llama_jax.checkpoints.huggingface import ignored_notes
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor, read_tensor
from llama_jax.checkpoints.safetensors_write import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorSpec,
    write_safetensors,
)
from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text
from llama_jax.formatting import report
from llama_jax.models.causal_lm import LlamaForCausalLM

TITLE = "Hugging Face"
DTYPE_NAMES = tuple(DTYPES)
specs = in_dtype
rule = casts
stored_bytes = plain_bytes
losses = no_losses
DEFAULT_SHARD = 5_000_000_000
_BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def recognises(path: Path) -> bool:
    """Whether it looks like one: a directory with weights of Hugging Face's names."""
    return path.is_dir() and any(
        (path / name).exists() for name in (SINGLE_FILE, INDEX_FILE, *_BIN_FILES)
    )


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in a Hugging Face directory; no tensor data is read until `load` is called.

    Without `tokenizer`, its files stay behind and faults in them do not matter.
    Raises ValueError, with every fault found, for missing, doubled, unexpected or misshapen tensors,
    damaged files, links and index entries that leave the directory, and another architecture.
    """
    require_inside(path, "config.json")
    config = LlamaConfig.from_pretrained(path)
    weights, load, rows, notes = _open(path)
    found = fit(LlamaForCausalLM, config, weights, path, "float32", rows)
    if found.faults:
        raise ValueError(report(str(path), found.faults))
    stored = {name: found.stored[name] for name in found.table}
    specs = tuple(
        TensorSpec(name, FLOAT_DTYPES[tensor.dtype], tensor.shape)
        for name, tensor in stored.items()
    )
    notes += ignored_notes(config, path)
    if found.wrappers:
        notes.append(f"{found.wrappers} is taken out of the tensors' names")
    card, more = card_facts(path)
    notes += more
    if found.tied is not None:
        notes.append("lm_head.weight, a copy of the embedding, is left out: the head is tied")
    return Checkpoint(
        format=TITLE,
        config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
        tensors=specs,
        load=lambda name: load(stored[name]),
        dtype=common_dtype(specs),
        files=read_companions(path, tokenizer=tokenizer),
        facts=stored_facts(list(stored.values())) | card,
        notes=tuple(notes),
    )


def write(
    checkpoint: Checkpoint,
    directory: Path,
    progress: Callable[[int], None],
    *,
    max_shard_size: int = DEFAULT_SHARD,
) -> None:
    """Write `checkpoint` into the new directory `directory`, a tensor at a time.

    Raises OSError for the disk's faults, and what `checkpoint.load` raises.
    """
    directory.mkdir()
    write_safetensors(
        directory,
        checkpoint.tensors,
        checkpoint.load,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    write_config(checkpoint, directory)
    write_companions(directory, checkpoint.files)


def write_config(checkpoint: Checkpoint, directory: Path) -> None:
    """Write config.json as both majors of transformers read it: 4 knows torch_dtype, 5 dtype."""
    dtype = common_dtype(checkpoint.tensors)
    fields = dict(checkpoint.config)
    if dtype is not None:
        fields |= {"torch_dtype": dtype, "dtype": dtype}
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    write_text(directory / "config.json", text + "\n")


def _open(path: Path) -> tuple[Weights, Callable[[StoredTensor], np.ndarray], Rows, list[str]]:
    """The headers of the weight files, what reads a tensor of theirs, or rows of one, and notes."""
    single, index = (SINGLE_FILE, INDEX_FILE)
    if not any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        single, index = _BIN_FILES
    if (path / single).exists():
        files = [single]
    else:
        require_inside(path, index)
        files = sorted(set(read_index(path / index).values()))
    for file in files:
        require_inside(path, file)
    if single == SINGLE_FILE:
        return open_weights(path), _read, read_rows, []
    opened: dict[Path, TorchFile] = {}

    def read_header(file: Path) -> Iterable[StoredTensor]:
        opened[file] = open_torch_file(file)
        return opened[file].tensors.values()

    weights = open_weights(path, single, index, read_header)
    notes = [f"{file.name} {WHOLE_NOTE}" for file, each in opened.items() if each.whole]

    def load(tensor: StoredTensor) -> np.ndarray:
        return opened[tensor.path].load(tensor.name)

    whole: dict[str, np.ndarray] = {}

    def rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        if tensor.name not in whole:
            whole[tensor.name] = load(tensor)
        return whole[tensor.name][start:stop]

    return weights, load, rows, notes


def _read(tensor: StoredTensor) -> np.ndarray:
    values = np.empty(tensor.shape, FLOAT_DTYPES[tensor.dtype])
    if not read_tensor(tensor, values):
        count = int(values.size - np.isfinite(values).sum())
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name}: {count} values are NaN or infinite, expected none"
        )
    return values


def stored_facts(stored: list[StoredTensor]) -> dict[str, Any]:
    """What `info` shows of the tensors in files: how many of each dtype, and bytes."""
    sizes: dict[str, dict[str, int]] = {}
    for tensor in stored:
        entry = sizes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
    files = sorted({tensor.path for tensor in stored})
    return {"stored": sizes, "file_bytes": sum(file.stat().st_size for file in files)}
