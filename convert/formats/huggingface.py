"""Hugging Face directories: config.json, safetensors (one or several) or `.bin` files, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.casting import CastRule
from convert.checkpoint import Checkpoint, common_dtype
from convert.companions import read_companions, require_inside
from convert.formats import fp8, plain
from convert.formats.directory import (
    checkpoint_of,
    model_tensors,
    rows_by_loading,
    spec_of,
    write_config_and_companions,
)
from convert.formats.plain import losses
from convert.formats.torch_files import OLD_FORM_NOTE, TorchFile, open_torch_file
from convert.renaming import Rename, renamed
from llama_jax.checkpoints.safetensors_read import (
    FLOAT_DTYPES,
    DequantizedTensor,
    StoredTensor,
    all_finite,
    parts_of,
    read_tensor,
)
from llama_jax.checkpoints.safetensors_write import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorSpec,
    write_safetensors,
)
from llama_jax.checkpoints.weight_files import (
    ReadRows,
    StoredWeights,
    open_weights,
    read_index,
    read_rows,
)
from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty

__all__ = [
    "cast_rule",
    "losses",
    "read",
    "recognizes",
    "stored_bytes",
    "target_specs",
    "write",
]

DEFAULT_SHARD = 5_000_000_000
_BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def recognizes(path: Path) -> bool:
    """Whether it looks like one: a directory with weights of Hugging Face's names."""
    return path.is_dir() and any(
        (path / name).exists() for name in (SINGLE_FILE, INDEX_FILE, *_BIN_FILES)
    )


def read(path: Path, *, tokenizer: bool = True, rename: Rename | None = None) -> Checkpoint:
    """The Llama in a Hugging Face directory; no tensor data is read until `load` is called.

    Args:
        tokenizer: whether to read it; if not, errors in it do not matter.
        rename: what is done to the stored names first.

    Raises:
        ValueError: with every problem: missing, duplicate, unexpected or misshapen tensors, damaged files,
            links and index entries that leave the directory, and another architecture.
    """
    require_inside(path, "config.json")
    config = LlamaConfig.from_pretrained(path)
    files = _open(path)
    weights = files.weights._replace(tensors=renamed(files.weights.tensors, rename))
    stored, notes = model_tensors(path, config, weights, files.read_rows)
    parts = [part for tensor in stored.values() for part in parts_of(tensor)]
    if files.weights.scheme:
        notes.append(f"the weights are dequantized ({files.weights.scheme})")
    checkpoint = checkpoint_of(
        path,
        title="Hugging Face",
        config=config,
        tensors=[spec_of(name, tensor) for name, tensor in stored.items()],
        load=lambda name: files.load(stored[name]),
        stored=parts,
        weight_files=[tensor.path for tensor in parts],
        files=read_companions(path, tokenizer=tokenizer),
        notes=[*files.notes, *files.weights.notes, *notes],
    )
    if not files.weights.scheme:
        return checkpoint
    facts = {"quantization": files.weights.scheme, **checkpoint.facts}
    return replace(checkpoint, dtype="float32", facts=facts)


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as `read` will return them."""
    if dtype == fp8.DTYPE:
        return fp8.target_specs(checkpoint)
    return plain.target_specs(checkpoint, dtype)


def cast_rule(checkpoint: Checkpoint, dtype: str | None) -> CastRule:
    """What `--dtype` does to a tensor."""
    return fp8.cast_rule if dtype == fp8.DTYPE else plain.cast_rule(checkpoint, dtype)


def stored_bytes(spec: TensorSpec, dtype: str | None) -> int:
    """Bytes on disk of a tensor of `target_specs`."""
    return fp8.stored_bytes(spec) if dtype == fp8.DTYPE else plain.stored_bytes(spec, dtype)


def write(
    checkpoint: Checkpoint,
    path: Path,
    progress: Callable[[int], None],
    *,
    max_shard_size: int = DEFAULT_SHARD,
) -> None:
    """Write `checkpoint` into the new directory `path`, a tensor at a time.

    Raises:
        OSError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    path.mkdir()
    specs, load = list(checkpoint.tensors), checkpoint.load
    fields: dict[str, Any] = {}
    if checkpoint.dtype == fp8.DTYPE:
        dtype = common_dtype([spec for spec in specs if not fp8.is_quantized(spec.name)])
        fields = {"quantization_config": fp8.CONFIG, "torch_dtype": dtype, "dtype": dtype}
        specs, load = fp8.stored_tensors(specs, load)
    write_safetensors(path, specs, load, max_shard_size=max_shard_size, progress=progress)
    write_config_and_companions(checkpoint, path, fields=fields)


@dataclass(frozen=True)
class _WeightFiles:
    """The weight files of a directory, of which only headers have been read."""

    weights: StoredWeights
    load: Callable[[StoredTensor], np.ndarray]
    read_rows: ReadRows
    notes: list[str]


def _open(path: Path) -> _WeightFiles:
    """The safetensors of a directory, or where there are none its `.bin` files."""
    if any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        _require_files_inside(path, SINGLE_FILE, INDEX_FILE)
        return _WeightFiles(open_weights(path), _read, read_rows, [])
    single, index = _BIN_FILES
    _require_files_inside(path, single, index)
    opened: dict[Path, TorchFile] = {}

    def read_header(file: Path) -> Iterable[StoredTensor]:
        opened[file] = open_torch_file(file)
        return opened[file].tensors.values()

    def read(tensor: StoredTensor) -> np.ndarray:
        return opened[tensor.path].load(tensor.name)

    def load(tensor: StoredTensor) -> np.ndarray:
        return _computed(tensor) if isinstance(tensor, DequantizedTensor) else read(tensor)

    weights = open_weights(path, single, index, read_header, read)
    notes = [f"{file.name} {OLD_FORM_NOTE}" for file, torch in opened.items() if torch.in_memory]
    return _WeightFiles(weights, load, rows_by_loading(load), notes)


def _require_files_inside(path: Path, single: str, index: str) -> None:
    """Raise ValueError for weight files that are links out of the directory."""
    if (path / single).exists():
        require_inside(path, single)
        return
    require_inside(path, index)
    for file in sorted(set(read_index(path / index).values())):
        require_inside(path, file)


def _read(tensor: StoredTensor) -> np.ndarray:
    if isinstance(tensor, DequantizedTensor):
        return _computed(tensor)
    values = empty(tensor.shape, FLOAT_DTYPES[tensor.dtype])
    if not read_tensor(tensor, values):
        raise _not_finite(tensor, values)
    return values


def _computed(tensor: DequantizedTensor) -> np.ndarray:
    values = tensor.values()
    if not all_finite(values):
        raise _not_finite(tensor, values)
    return values


def _not_finite(tensor: StoredTensor, values: np.ndarray) -> ValueError:
    with np.errstate(invalid="ignore"):  # some NaNs of bfloat16 signal
        count = int(values.size - np.isfinite(values).sum())
    return ValueError(
        f"{tensor.path}: tensor {tensor.name}: {count} values are NaN or infinite, expected none"
    )
