"""Layers of a stack that wait on the disk, because each piece of the stack has a part of all of them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from convert.formats.trees.tiles import copy
from llama_jax.files.direct import aligned_bytes
from llama_jax.files.page import whole_pages
from llama_jax.files.scratch import ScratchFile

Index = tuple[slice, ...]


class _Block(NamedTuple):
    within: Index
    """Where it belongs in a layer."""
    shape: tuple[int, ...]
    position: int
    """In the file, that of the first layer's; those of the others follow."""


class LayersOnDisk:
    """Takes the pieces of a stack as they come, and returns one layer after another."""

    def __init__(self, file: ScratchFile, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._dtype = dtype
        self._blocks: list[_Block] = []
        self._end = 0

    def add(self, within: Index, layers: np.ndarray) -> None:
        """Write a piece.

        Args:
            within: where it belongs in each layer.
            layers: the part of every layer, [layers, ...].
        """
        block = _Block(within, layers.shape[1:], self._end)
        memory = self._memory(block)
        for values in layers:
            copy(_as(memory, values.shape, self._dtype), values)
            self._file.write(memory, self._end)
            self._end += memory.nbytes
        self._blocks.append(block)

    def read(self, layer: int, target: np.ndarray) -> None:
        """Fill an array with a layer, counted among those here; the next block is read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            pending = [pool.submit(self._read, block, layer) for block in self._blocks[:1]]
            for number, block in enumerate(self._blocks):
                memory = pending.pop().result()
                for following in self._blocks[number + 1 : number + 2]:
                    pending.append(pool.submit(self._read, following, layer))
                copy(target[block.within], _as(memory, block.shape, self._dtype))

    def _read(self, block: _Block, layer: int) -> np.ndarray:
        memory = self._memory(block)
        self._file.read(memory, block.position + layer * memory.nbytes)
        return memory

    def _memory(self, block: _Block) -> np.ndarray:
        return aligned_bytes(whole_pages(math.prod(block.shape) * self._dtype.itemsize))


def _as(memory: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
