"""Write checkpoints of other programs with random weights, as large as those programs' own."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.formats.dcp.metadata import FILE as DCP_METADATA
from convert.formats.maxtext.names import LAYERS, rule_of
from convert.formats.orbax.arrays import file_store
from convert.formats.orbax.write import stand_ins
from convert.formats.state_dict_names import titan_name
from llama_jax.checkpoints.orbax import quiet_orbax
from llama_jax.checkpoints.safetensors_write import TensorSpec, write_safetensors
from llama_jax.config import LlamaConfig
from llama_jax.inspection.architecture import tensors

Shape = tuple[int, ...]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_POOL = 1 << 24  # values drawn, of which tensors are made
_SHARDS = 16  # devices that the writer had
_BLOCK = 128  # rows and columns that share an FP8 scale


class _Random:
    """Normal numbers; large arrays repeat them, in another order each time."""

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)
        self._pool = self._generator.standard_normal(_POOL, np.float32)

    def normal(self, shape: Shape, deviation: float, dtype: np.dtype) -> np.ndarray:
        """Values of `shape` with mean 0."""
        pool = (self._pool * np.float32(deviation)).astype(dtype)
        out = np.empty(shape, dtype)
        flat = out.reshape(-1)
        start = 0
        while start < flat.size:
            begin = int(self._generator.integers(_POOL // 2))
            part = pool[begin : begin + flat.size - start]
            flat[start : start + part.size] = part
            start += part.size
        return out


def write_fp8(config: LlamaConfig, directory: Path) -> None:
    """Hugging Face's layout with projections in FP8 and scales of blocks, as DeepSeek has them."""
    random = _Random()
    specs = []
    for tensor in tensors(config):
        quantized = ".layers." in tensor.name and len(tensor.shape) == 2
        specs.append(
            TensorSpec(tensor.name, _FLOAT8 if quantized else _BFLOAT16, tuple(tensor.shape))
        )
        if quantized:
            blocks = tuple(-(-size // _BLOCK) for size in tensor.shape)
            specs.append(TensorSpec(f"{tensor.name}_scale_inv", np.dtype(np.float32), blocks))
    by_name = {spec.name: spec for spec in specs}

    def values(name: str) -> np.ndarray:
        spec = by_name[name]
        if spec.dtype == _FLOAT8:
            return random.normal(spec.shape, 64, _FLOAT8)  # 448 is the largest
        if spec.dtype == np.float32:
            return np.abs(random.normal(spec.shape, 1e-4, spec.dtype)) + np.float32(1e-4)
        return random.normal(spec.shape, config.initializer_range, _BFLOAT16)

    directory.mkdir()
    write_safetensors(directory, specs, values)
    _write_config(
        config,
        directory,
        quantization_config={"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]},
    )


def write_maxtext(config: LlamaConfig, directory: Path) -> None:
    """MaxText's stacked parameters as Orbax saves them by default: OCDBT, compressed with zstd.

    Each array is in the pieces of 16 devices that share it along the embedding, so that every piece has
    parts of all layers.
    """
    random = _Random()
    items = directory / "0" / "items"
    items.parent.mkdir(parents=True)
    arrays: dict[str, tuple[Shape, Shape]] = {}
    for tensor in tensors(config):
        rule, layer = rule_of(tensor.name)
        stored = rule.stored_shape(tuple(tensor.shape), config)
        assert stored is not None
        chunk: Shape = stored
        if len(stored) > 1:
            embedding_last = "/out/" in rule.array or "/wo/" in rule.array
            axis = len(stored) - 1 if embedding_last else stored.index(config.hidden_size)
            chunk = (*stored[:axis], stored[axis] // _SHARDS, *stored[axis + 1 :])
        if layer is not None:
            stored, chunk = (
                (each[0], config.num_hidden_layers, *each[1:]) for each in (stored, chunk)
            )
        name = f"params.params.{rule.array.replace(LAYERS, 'layers').replace('/', '.')}"
        arrays[name] = stored, chunk
    with quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(items.absolute(), args=ocp.args.PyTreeSave(stand_ins(arrays)))
    for name, (shape, chunk) in arrays.items():
        store = ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": file_store(items), "path": f"{name}/"},
                "metadata": {
                    "shape": shape,
                    "chunks": chunk,
                    "dtype": "bfloat16",
                    "compressor": {"id": "zstd", "level": 1},
                },
            },
            create=True,
            delete_existing=True,
        ).result()
        starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
        for start in itertools.product(*starts):
            index = tuple(slice(at, at + step) for at, step in zip(start, chunk, strict=True))
            store[index] = random.normal(chunk, config.initializer_range, _BFLOAT16)
    settings = {"model_name": "llama3.1-8b", "rope_type": "llama3.1", "rope_max_timescale": 500000}
    (directory / "config.yml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
    _write_config(config, directory)


def write_dcp(config: LlamaConfig, directory: Path) -> None:
    """torch's distributed checkpoint with torchtitan's names, a file from each of 16 processes."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    random = _Random()
    directory.mkdir()
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    storage = {}
    for rank in range(_SHARDS):
        name_of_file = f"__{rank}_0.distcp"
        with (directory / name_of_file).open("w+b") as file:
            for tensor in tensors(config):
                name, shape = titan_name(tensor.name), tuple(tensor.shape)
                part = (shape[0] // _SHARDS, *shape[1:])
                offset = torch.Size([rank * part[0], *[0] * (len(shape) - 1)])
                chunks.setdefault(name, []).append(ChunkStorageMetadata(offset, torch.Size(part)))
                values = random.normal(part, config.initializer_range, _BFLOAT16)
                start = file.tell()
                torch.save(torch.from_numpy(values.view(np.int16)).view(torch.bfloat16), file)
                storage[MetadataIndex(name, offset, rank)] = _StorageInfo(
                    name_of_file, start, file.tell() - start
                )
    properties = TensorProperties(dtype=torch.bfloat16)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for tensor in tensors(config):
        name, size = titan_name(tensor.name), torch.Size(tensor.shape)
        entries[name] = TensorStorageMetadata(properties, size, chunks[name])
    metadata = Metadata(entries, {name: (name,) for name in entries}, storage, None)
    (directory / DCP_METADATA).write_bytes(pickle.dumps(metadata))
    _write_config(config, directory)


def _write_config(config: LlamaConfig, directory: Path, **fields: object) -> None:
    (directory / "config.json").write_text(json.dumps(config.to_dict() | fields))


FOREIGN: dict[str, Callable[[LlamaConfig, Path], None]] = {
    "dcp": write_dcp,
    "fp8": write_fp8,
    "maxtext": write_maxtext,
}
