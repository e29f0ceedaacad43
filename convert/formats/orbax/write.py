"""Write Orbax checkpoints, a layer at a time.

Layers are stacked, as in the model, and one stack of an 8B model takes 3.8 GB. So Orbax writes the tree,
TensorStore, with which Orbax itself stores arrays, creates them empty, and each layer is a chunk of its
own: a file of its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.checkpoint import DTYPES, Checkpoint
from convert.formats import plain
from convert.formats.directory import write_config_and_companions
from convert.formats.orbax.arrays import chunk_name, chunk_shape, file_store, slot_of
from llama_jax.checkpoints.dtypes import widest
from llama_jax.checkpoints.orbax import PARAMS, quiet_orbax
from llama_jax.checkpoints.safetensors_write import TensorSpec

_CHUNK_BYTES = 2**26  # of tensors that are not stacked


def target_specs(checkpoint: Checkpoint, dtype: str | None) -> list[TensorSpec]:
    """The tensors as they will be: a stack has one dtype, the widest of its layers'."""
    specs = plain.target_specs(checkpoint, dtype)
    dtypes: dict[str, set[np.dtype[Any]]] = {}
    for spec in specs:
        dtypes.setdefault(slot_of(spec.name).array, set()).add(spec.dtype)
    return [replace(spec, dtype=widest(dtypes[slot_of(spec.name).array])) for spec in specs]


def write(checkpoint: Checkpoint, path: Path, progress: Callable[[int], None]) -> None:
    """Write `checkpoint` into the new directory `path`, a layer's tensor at a time.

    Raises:
        OSError, ValueError: the disk is full or broken; also whatever `checkpoint.load` raises.
    """
    path.mkdir()
    params = path / PARAMS
    members: dict[str, list[TensorSpec]] = {}
    for spec in checkpoint.tensors:
        members.setdefault(slot_of(spec.name).array, []).append(spec)
    _write_tree(params, members)
    chunks = {array: _create(params / array, specs) for array, specs in members.items()}
    for spec in checkpoint.tensors:
        array, layer = slot_of(spec.name)
        values, chunk = checkpoint.load(spec.name), chunks[array]
        if layer is not None:
            _write_chunk(params / array, layer, values, chunk)
        else:
            for number, start in enumerate(range(0, len(values), chunk[0])):
                _write_chunk(params / array, number, values[start : start + chunk[0]], chunk)
        progress(spec.nbytes)
    write_config_and_companions(checkpoint, path)


def _write_tree(params: Path, arrays: Iterable[str]) -> None:
    """Orbax's description of the tree; the arrays in it are stand-ins, to be created anew."""
    tree: dict[str, Any] = {}
    for array in arrays:
        *parents, last = array.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros(1)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(params.absolute(), args=ocp.args.PyTreeSave(tree))


def _create(directory: Path, members: list[TensorSpec]) -> tuple[int, ...]:
    """Make the empty array of these tensors, uncompressed, for trained weights do not compress.

    Returns:
        The shape of its chunks.
    """
    first = members[0]
    shape: tuple[int, ...]
    if slot_of(first.name).layer is not None:
        shape, chunk = (len(members), *first.shape), (1, *first.shape)
    else:
        row_bytes = math.prod(first.shape[1:]) * first.dtype.itemsize
        rows = max(1, min(first.shape[0], _CHUNK_BYTES // row_bytes))
        shape, chunk = first.shape, (rows, *first.shape[1:])
    metadata = {
        "zarr_format": 2,
        "shape": shape,
        "chunks": chunk,
        "dtype": "bfloat16" if first.dtype == DTYPES["bfloat16"] else first.dtype.str,
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    spec = {"driver": "zarr", "kvstore": file_store(directory), "metadata": metadata}
    return chunk_shape(ts.open(spec, create=True, delete_existing=True).result())


def _write_chunk(array: Path, number: int, values: np.ndarray, chunk: tuple[int, ...]) -> None:
    """One chunk along the first axis: without compression its file is its bytes, the last one padded.

    As TensorStore would write it, which takes twice as long.
    """
    with (array / chunk_name(number, len(chunk))).open("wb") as file:
        file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        file.truncate(math.prod(chunk) * values.dtype.itemsize)
