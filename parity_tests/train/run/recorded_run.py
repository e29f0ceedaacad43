"""`python -m train` that also records the tokens of each step: RECORD.npz ARGUMENT..."""

import sys
from pathlib import Path

import numpy as np

import train.run.loop
from train.__main__ import main
from train.data.placement import placed_batches


def record_to(file: Path) -> None:
    """Each step's ids [micro, rows, seq] in the order of the data, -1 where another process has them."""
    steps: dict[str, np.ndarray] = {}

    def recorded(batch_spec, dataset, *, start_step=0):
        for step, batch in enumerate(
            placed_batches(batch_spec, dataset, start_step=start_step), start_step
        ):
            ids = np.full(batch.input_ids.shape, -1, np.int32)
            for shard in batch.input_ids.addressable_shards:
                ids[shard.index] = np.asarray(shard.data)
            if batch.order is not None:
                ids = ids[:, :, np.argsort(batch.order.slots(ids.shape[2]))]
            steps[f"{step}"] = ids
            np.savez(file, **steps)
            yield batch

    train.run.loop.placed_batches = recorded


if __name__ == "__main__":
    record_to(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
