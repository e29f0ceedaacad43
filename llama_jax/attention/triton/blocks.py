"""Block sizes of the three kernels."""

from typing import NamedTuple


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


def default_kernels(head_dim: int, interpret: bool = False) -> Kernels:
    """Blocks that sm_80, sm_90 and sm_100 compile without spilling registers."""
    return Kernels(
        forward=Blocks(128, 64, 8, 3),
        d_query=Blocks(128, 64, 8, 2),
        d_key_value=Blocks(64, 128 if head_dim < 128 else 64, 8, 2),
        interpret=interpret,
    )


def largest_blocks(kernels: Kernels) -> tuple[int, int]:
    """Of queries and of keys; all blocks are powers of two, so that they divide the largest."""
    blocks = kernels[:3]
    return max(each.queries for each in blocks), max(each.keys for each in blocks)
