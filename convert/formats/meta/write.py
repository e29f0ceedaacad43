"""Meta's checkpoints out: `params.json` and one `consolidated.00.pth`, a tensor at a time.

`torch.save` wants all tensors at once. The file is a zip of uncompressed entries, so it is written here:
first `data.pkl`, which names torch's own rebuilding functions and the storages, then the storages as
they come, each at a multiple of 64 bytes, as torch puts them for mapping into memory.
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
from convert.companions import write_companions
from convert.formats.huggingface import write_config
from convert.formats.meta.params import params_of
from convert.formats.meta.tensors import EMBEDDING, HEAD, slots
from convert.formats.meta.tokenizer import MODEL, metas_file
from convert.formats.rotary_rows import to_pairs
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


def write(checkpoint: Checkpoint, directory: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint` into the new directory `directory`; a tied head takes no room.

    Raises OSError for the disk's faults, and what `checkpoint.load` raises.
    """
    directory.mkdir()
    config = LlamaConfig.from_dict(checkpoint.config)
    with (directory / FILE).open("w+b") as file, zipfile.ZipFile(file, "w") as archive:
        _write_all(archive, checkpoint, config, progress)
    write_text(directory / "params.json", json.dumps(params_of(config), indent=2) + "\n")
    write_config(checkpoint, directory)
    model = metas_file(checkpoint.files)
    write_companions(directory, {**checkpoint.files, **({MODEL: model} if model else {})})


def _write_all(
    archive: zipfile.ZipFile,
    checkpoint: Checkpoint,
    config: LlamaConfig,
    progress: Callable[[int], None],
) -> None:
    table = slots(config)
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
        values, heads = checkpoint.load(spec.name), table[spec.name].heads
        values = np.ascontiguousarray(to_pairs(values, heads) if heads else values)
        _write_entry(archive, f"data/{i}", values.reshape(-1).view(np.uint8).data, progress)
        del values  # before the next is read


class _Storage(NamedTuple):
    """The entry `data/KEY`, which holds one tensor."""

    key: str
    spec: TensorSpec


class _Tensor:
    """A whole storage as a tensor, to be pickled the way torch pickles its own."""

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
    """The pickle that `torch.load(weights_only=True)` makes the tensors of."""
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
