"""Write Orbax checkpoints, a layer at a time.

Layers are stacked, as in the model, and one stack of an 8B model takes 3.8 GB. So Orbax writes the tree,
TensorStore, with which Orbax itself stores arrays, creates them empty, and each layer is a chunk of its
own: a file of its bytes.
"""

from __future__ import annotations

import json
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
from convert.formats.orbax.arrays import chunk_name, file_store, slot_of
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
    write_tree(params, members)
    for array, specs in members.items():
        stacked = slot_of(specs[0].name).layer is not None
        create_array(params / array, specs[0], layers=len(specs) if stacked else None)
    for spec in checkpoint.tensors:
        array, layer = slot_of(spec.name)
        write_values(params / array, checkpoint.load(spec.name), layer)
        progress(spec.nbytes)
    write_config_and_companions(checkpoint, path)


def write_tree(directory: Path, arrays: Iterable[str]) -> None:
    """Orbax's description of the tree; the arrays in it are stand-ins, to be created anew.

    Args:
        arrays: their names, the keys of the tree joined by dots.
    """
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(stand_ins(arrays)))


def stand_ins(arrays: Iterable[str]) -> dict[str, Any]:
    """A tree with a small array at each of these names.

    >>> stand_ins(["params.norm.scale", "step"])
    {'params': {'norm': {'scale': array([0.])}}, 'step': array([0.])}
    """
    tree: dict[str, Any] = {}
    for array in arrays:
        *parents, last = array.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.zeros(1)
    return tree


def create_array(directory: Path, spec: TensorSpec, layers: int | None, axis: int = 0) -> None:
    """Make the empty array of a tensor, uncompressed, for trained weights do not compress.

    Args:
        spec: its shape and dtype are those of the array, or of one layer in it.
        layers: how many are stacked along `axis`, each of which is a chunk; None for no stack.
    """
    shape: tuple[int, ...] = spec.shape
    if layers is not None:
        chunk = (*shape[:axis], 1, *shape[axis:])
        shape = (*shape[:axis], layers, *shape[axis:])
    else:
        row_bytes = math.prod(shape[1:]) * spec.dtype.itemsize
        rows = max(1, min(shape[0], _CHUNK_BYTES // row_bytes))
        chunk = (rows, *shape[1:])
    metadata = {
        "zarr_format": 2,
        "shape": shape,
        "chunks": chunk,
        "dtype": "bfloat16" if spec.dtype == DTYPES["bfloat16"] else spec.dtype.str,
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    store = {"driver": "zarr", "kvstore": file_store(directory), "metadata": metadata}
    ts.open(store, create=True, delete_existing=True).result()


def write_values(directory: Path, values: np.ndarray, layer: int | None, axis: int = 0) -> None:
    """Write a tensor, or one layer of a stack, into the array that `create_array` has made.

    Without compression the file of a chunk is its bytes, the last one padded. TensorStore would write the
    same and take twice as long.
    """
    if layer is not None:
        index = ["0"] * (values.ndim + 1)
        index[axis] = str(layer)
        _write_chunk(directory / ".".join(index), values, values.size)
        return
    rows = json.loads((directory / ".zarray").read_text())["chunks"][0]
    for number, start in enumerate(range(0, len(values), rows)):
        size = rows * math.prod(values.shape[1:])
        _write_chunk(
            directory / chunk_name(number, values.ndim), values[start : start + rows], size
        )


def _write_chunk(file: Path, values: np.ndarray, size: int) -> None:
    with file.open("wb") as stream:
        stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        stream.truncate(size * values.dtype.itemsize)
