"""Write torch distributed checkpoints, a tensor at a time, in torchtitan's names.

torch's own writer holds every tensor of a file until it is complete. So the files are written here, one for
each tensor, as torch does with `single_file_per_rank=False`; `.metadata` is made of torch's own classes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.formats import plain
from convert.formats.dcp.metadata import FILE
from convert.formats.directory import write_config_and_companions
from convert.formats.llama_tensors import rotary_heads, to_pairs
from convert.formats.state_dict_names import titan_name
from convert.formats.torch_files import require_torch
from convert.formats.torch_write import Storage, write_torch_file
from llama_jax.checkpoints.safetensors_write import TensorSpec
from llama_jax.config import LlamaConfig


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be; raises ValueError where torch is not installed."""
    require_torch()
    return plain.target_specs(checkpoint, dtype)


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint` into the new directory `path`, with config.json and the tokenizer beside it.

    A tied head is stored twice, for torchtitan loads both names.

    Raises:
        OSError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    path.mkdir()
    config = LlamaConfig.from_dict(checkpoint.config)
    files: dict[str, tuple[TensorSpec, str]] = {}
    for number, spec in enumerate(checkpoint.tensors):
        file = f"__0_{number}.distcp"

        def parts(_: int, spec: TensorSpec = spec) -> Iterator[np.ndarray]:
            yield to_pairs(checkpoint.load(spec.name), rotary_heads(spec.name, config))

        storage = Storage("0", spec.dtype, spec.shape)
        with (path / file).open("w+b") as stream:
            write_torch_file(stream, "archive", storage, [storage], parts, progress)
        files[titan_name(spec.name)] = spec, file
    if config.tie_word_embeddings:
        files[titan_name("lm_head.weight")] = files[titan_name("model.embed_tokens.weight")]
    (path / FILE).write_bytes(_metadata(path, files))
    write_config_and_companions(checkpoint, path)


def _metadata(path: Path, files: dict[str, tuple[TensorSpec, str]]) -> bytes:
    """The pickle that torch reads: every tensor is one piece."""
    import torch
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage = {}
    for name, (spec, file) in files.items():
        size, begin = torch.Size(spec.shape), torch.Size([0] * len(spec.shape))
        properties = TensorProperties(dtype=getattr(torch, str(spec.dtype)))
        tensors[name] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(begin, size)])
        length = (path / file).stat().st_size
        storage[MetadataIndex(name, begin, 0)] = _StorageInfo(file, 0, length)
    planner_data = {name: (name,) for name in tensors}
    return pickle.dumps(
        Metadata(tensors, planner_data, storage, StorageMeta(), CURRENT_DCP_VERSION)
    )
