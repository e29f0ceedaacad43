"""Block sizes of the three kernels."""

import re
from typing import Any, NamedTuple

from llama_jax.numerics.backend import target_device_kind


class Blocks(NamedTuple):
    """Block sizes of one kernel, how many warps compute it and how many loads are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class Kernels(NamedTuple):
    """The blocks of the three kernels; static under `jax.jit`.

    interpret: run them as plain JAX, on any backend.
    """

    forward: Blocks
    d_query: Blocks
    d_key_value: Blocks
    interpret: bool = False


# By the largest head_dim: without spilled registers on sm_80, sm_90 and sm_100, and within the 99 KiB of
# shared memory of the smallest GPUs since Ampere.
_DEFAULT = {
    64: Kernels(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
    128: Kernels(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2)),
    256: Kernels(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1)),
}
LARGEST_HEAD_DIM = max(_DEFAULT)
# Of Hopper and Blackwell in data centers, whose matmuls take 64 rows for each group of 4 warps. Those of 64
# and 128 are the fastest of some twenty on an H100 (docs/log.md). Ampere would spill registers; no other
# GPU, GB10 among them, has the shared memory.
_WITH_WARP_GROUPS = re.compile(r"\bG?[HB]\d{3}\b")
_LARGER: dict[int, dict[str, Any]] = {
    64: {
        "forward": Blocks(64, 128, 4, 2),
        "d_query": Blocks(64, 64, 4, 3),
        "d_key_value": Blocks(128, 64, 4, 2),
    },
    128: {
        "forward": Blocks(128, 128, 8, 3),
        "d_query": Blocks(128, 64, 8, 3),
        "d_key_value": Blocks(64, 64, 4, 2),
    },
    256: {"forward": Blocks(64, 64, 8, 2), "d_query": Blocks(64, 32, 8, 2)},
}


def default_kernels(head_dim: int, device_kind: str | None = None) -> Kernels:
    """The blocks for vectors of `head_dim`, at most `LARGEST_HEAD_DIM`.

    Args:
        device_kind: as JAX names the GPU; default: the one that is compiled for.
    """
    size = min(size for size in _DEFAULT if size >= head_dim)
    kernels = _DEFAULT[size]
    if _WITH_WARP_GROUPS.search(device_kind or target_device_kind()):
        return kernels._replace(**_LARGER.get(size, {}))
    return kernels


def largest_blocks(kernels: Kernels) -> tuple[int, int]:
    """Of queries and of keys; all blocks are powers of two, so that they divide the largest."""
    blocks = kernels[:3]
    return max(each.queries for each in blocks), max(each.keys for each in blocks)
