"""What a layer keeps for its backward pass, in a module that command lines can import without JAX."""

from typing import Literal, NamedTuple

Remat = Literal["none", "dots", "full"]
# the outputs of a layer's matmuls and of attention, by the names that `jax.ad_checkpoint` knows them by
KeptName = Literal["query", "key", "value", "attention", "output", "gate", "up", "down"]
# and the layer's input, which is always kept: on the device or in the host's memory
OffloadedName = Literal[
    "input", "query", "key", "value", "attention", "output", "gate", "up", "down"
]


class Kept(NamedTuple):
    """A remat policy that keeps a layer's input and values by name, and recomputes all others.

    The names are those of projections ("query", "key", "value" and "output" of attention; "gate", "up" and
    "down" of the MLP), each kept where it has been rounded, and "attention", the output before "output"
    with the statistics of its rows.

    Attributes:
        saved: kept on the device.
        offloaded: kept in the host's memory, and brought back for the backward pass; may have "input".
    """

    saved: tuple[KeptName, ...] = ()
    offloaded: tuple[OffloadedName, ...] = ()
