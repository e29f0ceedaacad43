"""The arrays of one training step."""

from typing import NamedTuple

from jaxtyping import Array, Int

from llama_jax.attention.zigzag import ZigZag


class Batch(NamedTuple):
    """Packed windows, split into micro-batches: all int32 [micro, rows, seq].

    labels: the next token, already shifted; IGNORE_INDEX if there is none.
    order: in which all of them have the tokens of a window; None for the window's own.
    """

    input_ids: Int[Array, "micro rows seq"]
    labels: Int[Array, "micro rows seq"]
    segment_ids: Int[Array, "micro rows seq"]
    position_ids: Int[Array, "micro rows seq"]
    order: ZigZag | None = None
