"""The order of a row's tokens in which every shard of a causal sequence has the same work."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

# of queries, in all kernels
_SMALLEST_BLOCK, _LARGEST_BLOCK = 128, 512


@jax.tree_util.register_static
@dataclass(frozen=True)
class ZigZag:
    """Chunks of a row dealt to shards back and forth: 0 1 2 3, 3 2 1 0, 0 1 2 3, and so on.

    In causal attention a query's work grows with its place in the row, so that of contiguous shards the
    last one does nearly twice the mean. Two rounds of chunks, there and back, give every shard the same
    (section 3.3.2 of arXiv:2407.21783, where there are just two rounds). With short chunks that also holds
    for every long document of a packed row, not only for the row.

    Static under `jax.jit`: a pytree without leaves.

    Attributes:
        shards: parts of the sequence, in whose order the array lies.
        chunk: tokens dealt at a time; 2 * shards * chunk divides the length.

    Examples:
        >>> from llama_jax.attention.zigzag import ZigZag
        >>> ZigZag(shards=2, chunk=1).slots(8)
        array([0, 3, 4, 7, 1, 2, 5, 6], dtype=int32)
    """

    shards: int
    chunk: int

    @classmethod
    def of(cls, length: int, shards: int) -> "ZigZag":
        """The order of `length` tokens over `shards`, in chunks that are whole blocks of any kernel.

        They are as short as a block of queries, or two for each shard where blocks do not divide them.

        Raises:
            ValueError: a length that is not a multiple of 2 * shards.
        """
        longest = length // (2 * shards)
        block = math.gcd(longest, _LARGEST_BLOCK)
        order = cls(shards, longest if block < _SMALLEST_BLOCK else block)
        order.require_length(length)
        return order

    def require_length(self, length: int) -> None:
        """Raise a ValueError for a length that is not a multiple of 2 * shards * chunk."""
        unit = 2 * self.shards * self.chunk
        if length % unit:
            raise ValueError(
                f"zig-zag order: found {length} tokens, expected a multiple of {unit}: 2 x {self.shards} "
                f"shards x chunks of {self.chunk}"
            )

    def slots(self, length: int) -> Int[np.ndarray, " {length}"]:
        """Of every position of the array, the place in the row; ascending within a shard.

        Raises:
            ValueError: as `require_length`.
        """
        self.require_length(length)
        row = np.arange(length, dtype=np.int32).reshape(-1, 2, self.shards, self.chunk)
        row[:, 1] = row[:, 1, ::-1]
        return row.transpose(2, 0, 1, 3).reshape(length)

    def deal(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """`x`, in the order of the row along `axis`, in the order of the shards."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        row = x.reshape(*before, -1, 2, self.shards, self.chunk, *after)
        dealt = jnp.moveaxis(_turn(row, axis + 1), axis + 2, axis)
        return dealt.reshape(x.shape)

    def collect(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """The inverse of `deal`: `x` in the order of the row."""
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        dealt = x.reshape(*before, self.shards, -1, 2, self.chunk, *after)
        return _turn(jnp.moveaxis(dealt, axis, axis + 2), axis + 1).reshape(x.shape)


def _turn(rounds: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """The second of the two rounds along `axis` in the opposite order of shards, which follow."""
    there, back = jnp.split(rounds, 2, axis)
    return jnp.concatenate([there, jnp.flip(back, axis + 1)], axis)
