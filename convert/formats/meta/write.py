"""Write Meta's checkpoints: `params.json` and one `consolidated.00.pth`, a tensor at a time.

`torch.save` needs all tensors at once. The file is a zip of uncompressed entries, so it is written here:
first `data.pkl`, which names torch's own rebuilding functions and the storages, then the storages one after
another, each at a multiple of 64 bytes, where torch puts them so that they can be mapped into memory.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.checkpoint import Checkpoint
from convert.formats import plain
from convert.formats.directory import write_config_and_companions
from convert.formats.llama_tensors import to_pairs
from convert.formats.meta.params import config_of, params_of
from convert.formats.meta.tensors import EMBEDDING, HEAD, meta_tensors
from convert.formats.meta.tokenizer import MODEL, meta_tokenizer
from convert.formats.torch_files import require_torch
from convert.same_function import config_differences
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.files.staging import write_text

FILE = "consolidated.00.pth"
_TOP = "consolidated"  # the directory within the zip
_ALIGNMENT = 64
_CHUNK = 2**26  # bytes per write
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


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
    with (path / FILE).open("w+b") as file, zipfile.ZipFile(file, "w") as archive:
        _write_archive(archive, checkpoint, config, progress)
    write_text(path / "params.json", json.dumps(params_of(config), indent=2) + "\n")
    files = dict(checkpoint.files)
    if (model := meta_tokenizer(files)) is not None:
        files[MODEL] = model
    write_config_and_companions(checkpoint, path, files)


def _write_archive(
    archive: zipfile.ZipFile,
    checkpoint: Checkpoint,
    config: LlamaConfig,
    progress: Callable[[int], None],
) -> None:
    table = meta_tensors(config)
    tensors = {
        table[spec.name].name: _Tensor(_Storage(str(i), spec))
        for i, spec in enumerate(checkpoint.tensors)
    }
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    _write_entry(archive, "data.pkl", _state_dict(tensors))
    _write_entry(archive, "byteorder", b"little")
    _write_entry(archive, "version", b"3\n")
    for i, spec in enumerate(checkpoint.tensors):
        values = to_pairs(checkpoint.load(spec.name), table[spec.name].heads)
        values = np.ascontiguousarray(values)
        _write_entry(archive, f"data/{i}", values.reshape(-1).view(np.uint8).data, progress)
        del values  # before the next is read


class _Storage(NamedTuple):
    """The entry `data/KEY`, which holds one tensor."""

    key: str
    spec: TensorSpec


class _Tensor:
    """A storage as one tensor, to be pickled the way torch pickles its own."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        from torch._utils import _rebuild_tensor_v2

        shape = self.storage.spec.shape
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return _rebuild_tensor_v2, (self.storage, 0, shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Storages are named, not pickled, as `torch.save` has it."""

    def persistent_id(self, value: Any) -> Any:
        import torch

        if not isinstance(value, _Storage):
            return None
        kind = getattr(torch, _STORAGES[str(value.spec.dtype)])
        return "storage", kind, value.key, "cpu", value.spec.size


def _state_dict(tensors: Mapping[str, _Tensor]) -> bytes:
    """The pickle that `torch.load(weights_only=True)` rebuilds the tensors from."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()


def _write_entry(
    archive: zipfile.ZipFile,
    name: str,
    content: bytes | memoryview,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Add an entry whose bytes begin at a multiple of 64; zipfile adds their CRC-32."""
    entry = zipfile.ZipInfo(f"{_TOP}/{name}")
    assert archive.fp is not None
    header = 30 + len(entry.filename) + 4 + 20  # the padding has a head of 4, zip64's sizes take 20
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as file:
        for start in range(0, len(content), _CHUNK):
            progress(file.write(content[start : start + _CHUNK]))
