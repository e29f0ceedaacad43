"""The arrays of an Orbax checkpoint, opened with TensorStore, and the tensors that they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES
from llama_jax.checkpoints.safetensors_write import DTYPE_NAMES as STORED_NAMES
from llama_jax.files.buffers import empty
from llama_jax.files.direct import can_read_directly
from llama_jax.files.download import on_disk
from llama_jax.files.json_object import read_json_object
from llama_jax.files.page_cache import fits_page_cache
from llama_jax.formatting import first_line

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.+)")
_METADATA_KEY = re.compile(r"(.+)/(\.zarray|zarr\.json)")
_MAX_LAYERS = 2**16  # of a damaged shape, more are not listed


class Slot(NamedTuple):
    """Where a tensor is in the parameter tree."""

    array: str
    """The array's name: the keys of the tree joined by dots, without a layer's number."""
    layer: int | None
    """Its index in the array, which stacks all layers; None for an array that is one tensor."""


def slot_of(name: str) -> Slot:
    """Where the tensor that Hugging Face calls `name` is.

    >>> slot_of("model.layers.3.mlp.up_proj.weight")
    Slot(array='model.layers.mlp.up_proj.weight', layer=3)
    """
    match = _LAYER.fullmatch(name)
    return Slot(f"{match[1]}.{match[3]}", int(match[2])) if match else Slot(name, None)


@dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint, not read yet."""

    name: str
    directory: Path
    """Of its chunks, where these are files."""
    store: ts.TensorStore
    complete: bool
    """Whether all of its chunks are there; one that is missing would be read as zeros."""
    fingerprint: int | None
    """Of its values, where `python -m train` has recorded it."""

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of all layers' tensors."""
        return ".layers." in self.name

    @property
    def dtype(self) -> str:
        """As safetensors calls it; for others, TensorStore's name."""
        return STORED_NAMES.get(np.dtype(self.store.dtype.numpy_dtype), str(self.store.dtype))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, or of one layer's."""
        return tuple(self.store.shape[1:] if self.stacked else self.store.shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of what is stored as one piece."""
        return chunk_shape(self.store)

    def tensor_names(self) -> list[str]:
        """Hugging Face's names of the tensors in it, one for each layer of a stack."""
        if not self.stacked:
            return [self.name]
        before, _, after = self.name.partition(".layers.")
        layers = self.store.shape[0] if self.store.ndim else 0
        return [f"{before}.layers.{layer}.{after}" for layer in range(min(layers, _MAX_LAYERS))]

    def problem(self) -> str | None:
        """What keeps it from being read; None if nothing does."""
        if self.stacked and not (self.store.ndim and self.store.shape[0] <= _MAX_LAYERS):
            shape = list(self.store.shape)
            return f"{self.name}: found shape {shape}, expected a stack of layers"
        if self.dtype not in FLOAT_DTYPES:
            return f"{self.name}: found dtype {self.dtype}, expected {', '.join(FLOAT_DTYPES)}"
        if not self.complete:
            return f"{self.name}: some of its chunks are missing"
        return None

    def layer_file(self, layer: int) -> Path | None:
        """The file that is a layer's bytes, as the writer here makes it; None where there is none."""
        if not self.stacked or not self._layers_are_files:
            return None
        return self.directory / chunk_name(layer, self.store.ndim)

    @cached_property
    def _layers_are_files(self) -> bool:
        spec = self.store.spec().to_json()
        metadata, dtype = spec["metadata"], np.dtype(self.store.dtype.numpy_dtype)
        return (
            spec["driver"] == "zarr"
            and spec["kvstore"]["driver"] == "file"
            and self.chunk_shape == (1, *self.tensor_shape)
            and metadata["compressor"] is None
            and not metadata.get("filters")
            and metadata["order"] == "C"
            and metadata["dimension_separator"] == "."
            and metadata["dtype"] in ("bfloat16", dtype.newbyteorder("<").str)
        )


def open_arrays(params: Path) -> list[StoredArray]:
    """Every array of the checkpoint in the directory `params`; a remote one is copied first.

    Raises:
        ValueError: a directory that is no Orbax checkpoint, is damaged, or has a link that leaves it.
    """
    if not (params / "_METADATA").is_file():
        raise ValueError(f"{params}: not an Orbax checkpoint (no _METADATA in it)")
    local = on_disk(params)
    entries = list(local.rglob("*"))
    for link in entries:
        if link.is_symlink() and not link.resolve().is_relative_to(local.resolve()):
            raise ValueError(f"{link}: a link to {link.resolve()}, expected it to stay within")
    base: dict[str, Any] = file_store(local)
    files = [entry for entry in entries if entry.is_file()]
    if not fits_page_cache(sum(file.stat().st_size for file in files)) and can_read_directly(
        files[0]
    ):
        base["file_io_mode"] = {"mode": "direct"}
    if (local / "manifest.ocdbt").exists():
        base = {"driver": "ocdbt", "base": base}
    try:
        keys = [key.decode() for key in ts.KvStore.open(base).result().list().result()]
        stores: dict[str, ts.TensorStore] = {}
        for match in filter(None, map(_METADATA_KEY.fullmatch, keys)):
            spec = {
                "driver": "zarr" if match[2] == ".zarray" else "zarr3",
                "kvstore": {**base, "path": base.get("path", "") + f"{match[1]}/"},
            }
            stores[match[1]] = ts.open(spec, open=True).result()
        complete = {name: _is_complete(name, store, keys) for name, store in stores.items()}
    except Exception as error:  # TensorStore raises whatever the damage leads it to
        raise ValueError(f"{params}: not an Orbax checkpoint ({first_line(error)})") from None
    fingerprints = _fingerprints(params, list(stores))
    return [
        StoredArray(name, local / name, store, complete[name], fingerprints.get(name))
        for name, store in stores.items()
    ]


def _is_complete(name: str, store: ts.TensorStore, keys: list[str]) -> bool:
    chunks = math.prod(
        math.ceil(n / chunk) for n, chunk in zip(store.shape, chunk_shape(store), strict=True)
    )
    present = sum(key.startswith(f"{name}/") for key in keys) - 1  # without its metadata
    return present >= chunks


def files_of(arrays: Iterable[StoredArray]) -> list[Path]:
    """All files of the checkpoints that these arrays are in, on this machine."""
    directories = {array.directory.parent for array in arrays}
    return [file for path in directories for file in path.rglob("*") if file.is_file()]


def _fingerprints(params: Path, arrays: list[str]) -> dict[str, int]:
    """What `python -m train` has recorded, by array; {} where it has not."""
    file = params.parent / "facts" / "metadata"
    if not file.is_file():
        return {}
    recorded = read_json_object(file).get("fingerprints")
    # of parameters and optimizer state, in the order of a tree's leaves
    ordered = sorted(arrays, key=lambda name: name.split("."))
    if not isinstance(recorded, list) or len(recorded) < len(ordered):
        raise ValueError(f"{file}: has no fingerprints of all {len(ordered)} arrays")
    return dict(zip(ordered, recorded, strict=False))


def read_into_buffer(store: ts.TensorStore, dtype: np.dtype[Any]) -> np.ndarray:
    """The values of an array, or of a part of one, in memory of `buffers.empty`."""
    return start_reading(store, dtype)()


def start_reading(store: ts.TensorStore, dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
    """The same in the background; what is returned waits for the values and returns them."""
    values = empty(tuple(store.shape), dtype)
    written = ts.array(values, dtype=store.dtype, copy=False, write=True).write(store)

    def wait() -> np.ndarray:
        written.result()
        return values

    return wait


def chunk_shape(store: ts.TensorStore) -> tuple[int, ...]:
    """The shape of what an array stores as one piece."""
    return tuple(int(n or 1) for n in store.chunk_layout.write_chunk.shape or ())


def chunk_name(number: int, dimensions: int) -> str:
    """The file of a chunk along the first axis, the only one that is divided.

    >>> chunk_name(3, dimensions=2)
    '3.0'
    """
    return ".".join([str(number), *["0"] * (dimensions - 1)])


def file_store(directory: Path) -> dict[str, str]:
    """TensorStore's description of a directory of files."""
    return {"driver": "file", "path": f"{directory.absolute()}/"}
