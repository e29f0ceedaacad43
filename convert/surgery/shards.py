"""`--to-shards`: the size of files of which there are so many."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.checkpoints.safetensors_write import TensorSpec, plan_shards


def shard_size_for(specs: Sequence[TensorSpec], count: int) -> int:
    """The smallest `max_shard_size` with which tensors fill `count` files, whose sizes are then most alike.

    Raises:
        ValueError: a count that no size gives, for tensors are not divided.

    >>> import numpy as np
    >>> specs = [TensorSpec(name, np.dtype(np.float32), (10,)) for name in "abc"]
    >>> shard_size_for(specs, 2)
    80
    """
    if not 0 < count <= len(specs):
        raise ValueError(f"to_shards: found {count}, expected 1 to {len(specs)}, a tensor a file")
    low, high = 1, max(1, sum(spec.nbytes for spec in specs))
    while low < high:  # the number of files does not grow with their size
        middle = (low + high) // 2
        if len(plan_shards(specs, middle)) > count:
            low = middle + 1
        else:
            high = middle
    made = len(plan_shards(specs, low))
    if made != count:
        more = len(plan_shards(specs, max(low - 1, 1)))
        raise ValueError(
            f"to_shards: {count} files cannot be filled with tensors in order; choose {made} or {more}"
        )
    return low
