"""Batches as global arrays: each process reads its rows and puts them on its devices."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np

from train.data.batch import Batch
from train.data.windows import Window, batches


def placed_batches(
    batch: Batch, dataset: Any, *, start_step: int = 0
) -> Generator[Batch, None, None]:
    """Batches of `dataset` from `start_step` on; each process reads only its own rows.

    Args:
        batch: abstract arrays [micro, rows, seq] with shardings, and their order.
        dataset: random access to windows, see `train.data.windows.windows`.
    """
    micro, rows, _ = batch.input_ids.shape
    local_rows = rows_of_process(batch)
    with closing(
        batches(dataset, batch_size=micro * rows, rows=local_rows, start_step=start_step)
    ) as local_batches:
        for windows in local_batches:
            yield place_batch(batch, local_rows, windows)


def rows_of_process(batch: Any) -> list[int]:
    """The rows of the global batch, numbered through all micro-batches, on this process's devices."""
    array = batch.input_ids
    micro_batches, rows, _ = array.shape
    local: set[int] = set()
    for index in array.sharding.addressable_devices_indices_map(array.shape).values():
        local |= set(range(rows)[index[1]])
    return [micro * rows + row for micro in range(micro_batches) for row in sorted(local)]


def place_batch(batch: Any, rows: Sequence[int], windows: Window) -> Batch:
    """This process's windows as its part of the global arrays.

    Args:
        batch: abstract arrays [micro, rows, seq] with shardings, and their order.
        rows: what `rows_of_process` returned for it.
        windows: arrays [len(rows), seq] by name, in the order of the window.
    """
    local_index = {row: index for index, row in enumerate(rows)}
    seq = batch.input_ids.shape[2]
    slots = np.arange(seq) if batch.order is None else batch.order.slots(seq)

    def place(abstract: Any, values: np.ndarray) -> jax.Array:
        _, rows_per_micro, _ = abstract.shape

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            micro, row, column = (
                range(*part.indices(size)) for part, size in zip(index, abstract.shape, strict=True)
            )
            selected = [local_index[m * rows_per_micro + r] for m in micro for r in row]
            columns = slots[column.start : column.stop]
            part = values[np.ix_(np.array(selected), columns)]
            return part.reshape(len(micro), len(row), len(column))

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, shard)

    placed = {name: place(getattr(batch, name), values) for name, values in windows.items()}
    return Batch(**placed, order=batch.order)
