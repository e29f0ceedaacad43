"""Read Orbax checkpoints, a layer at a time where their chunks allow it."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np

from convert.checkpoint import Checkpoint
from convert.companions import read_companions, require_inside
from convert.formats.directory import checkpoint_of, model_tensors, rows_by_loading, spec_of
from convert.formats.orbax.arrays import Slot, StoredArray, files_of, open_arrays, read_into_buffer
from llama_jax.checkpoints.fingerprint import fingerprint
from llama_jax.checkpoints.orbax import locate
from llama_jax.checkpoints.safetensors_read import FLOAT_DTYPES, StoredTensor, read_tensor
from llama_jax.checkpoints.weight_files import StoredWeights
from llama_jax.config import LlamaConfig
from llama_jax.files.buffers import empty
from llama_jax.formatting import first_line


def read(path: Path, *, tokenizer: bool = True) -> Checkpoint:
    """The Llama in an Orbax directory; of a run, the newest step. No values are read before `load`.

    Args:
        tokenizer: whether to read it; if not, errors in it do not matter.

    Raises:
        ValueError: with every problem: a directory without a finished checkpoint, arrays that are missing,
            damaged, unexpected or misshapen, and another architecture.
    """
    home, params = locate(path)
    require_inside(home, "config.json")
    config = LlamaConfig.from_pretrained(home)
    arrays = open_arrays(params)
    reader = _Reader(params, arrays)
    rows = rows_by_loading(lambda tensor: reader.load(tensor.name))
    stored, notes = model_tensors(path, config, reader.weights(), rows)
    return checkpoint_of(
        home,
        title=f"Orbax, {params.relative_to(home)}",
        config=config,
        tensors=[spec_of(name, tensor) for name, tensor in stored.items()],
        load=lambda name: reader.load(stored[name].name),
        stored=stored.values(),
        weight_files=files_of(arrays),
        files=read_companions(home, tokenizer=tokenizer),
        notes=notes,
    )


class _Reader:
    """Reads the tensors in the arrays of a checkpoint, and checks the arrays' fingerprints on the way."""

    def __init__(self, params: Path, arrays: list[StoredArray]) -> None:
        self._params = params
        self._arrays = {array.name: array for array in arrays}
        self._slots = {
            name: Slot(array.name, number if array.stacked else None)
            for array in arrays
            for number, name in enumerate(array.tensor_names())
        }
        # the one stack whose chunks span several layers that is held in memory
        self._stack: tuple[str, np.ndarray] | None = None
        # fingerprints of the layers read so far, by array
        self._layers: dict[str, dict[int, int]] = {array.name: {} for array in arrays}

    def weights(self) -> StoredWeights:
        """Every tensor that can be read, and what is wrong with the others."""
        stored: dict[str, StoredTensor] = {}
        problems: list[str] = []
        unreadable: set[str] = set()
        for array in self._arrays.values():
            names = array.tensor_names()
            if (problem := array.problem()) is not None:
                problems.append(problem)
                unreadable.update(names)
                continue
            shape = array.tensor_shape
            nbytes = math.prod(shape) * FLOAT_DTYPES[array.dtype].itemsize
            for number, name in enumerate(names):
                file = array.layer_file(number) or array.directory
                stored[name] = StoredTensor(file, name, array.dtype, shape, 0, nbytes)
        return StoredWeights(stored, problems, unreadable)

    def load(self, name: str) -> np.ndarray:
        """The values of a tensor.

        Raises:
            ValueError: they cannot be read, or are not those that were saved.
        """
        slot = self._slots[name]
        array = self._arrays[slot.array]
        try:
            values = self._values(array, slot.layer)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._params}: tensor {name}: {first_line(error)}") from None
        if array.fingerprint is not None:
            self._check_fingerprint(array, slot.layer, values)
        return values

    def _values(self, array: StoredArray, layer: int | None) -> np.ndarray:
        if layer is None:
            return read_into_buffer(array.store, FLOAT_DTYPES[array.dtype])
        if (file := array.layer_file(layer)) is not None:
            return _read_layer_file(file, array)
        if array.chunk_shape[0] == 1:
            return read_into_buffer(array.store[layer], FLOAT_DTYPES[array.dtype])
        stack = self._stack
        if stack is None or stack[0] != array.name:
            stack = self._stack = None  # freed before the next one is read
            stack = self._stack = array.name, array.store.read().result()
        return stack[1][layer].copy()

    def _check_fingerprint(self, array: StoredArray, layer: int | None, values: np.ndarray) -> None:
        """Compare with what was saved once all layers have been read; theirs add up to the array's."""
        layers = self._layers[array.name]
        rows = values if layer is None else values[None]
        layers[layer or 0] = int(jax.jit(fingerprint)(rows, layer or 0))
        all_read = layer is None or len(layers) == array.store.shape[0]
        if all_read and sum(layers.values()) % 2**32 != array.fingerprint:
            raise ValueError(
                f"{self._params}: {array.name}: its values are not what was saved: "
                "the checkpoint is damaged"
            )


def _read_layer_file(file: Path, array: StoredArray) -> np.ndarray:
    """A layer that is a file of its bytes. Raises ValueError for a file of another size."""
    shape, dtype = array.tensor_shape, FLOAT_DTYPES[array.dtype]
    size, expected = file.stat().st_size, math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(f"{size} bytes in {file}, expected {expected}")
    values = empty(shape, dtype)
    read_tensor(StoredTensor(file, file.name, array.dtype, shape, 0, expected), values)
    return values
