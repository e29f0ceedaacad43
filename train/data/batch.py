"""The arrays of one training step."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Batch(NamedTuple):
    """Packed windows, split into micro-batches: all int32 [micro, rows, seq].

    labels: the next token, already shifted; IGNORE_INDEX if there is none.
    """

    input_ids: Int[Array, "micro rows seq"]
    labels: Int[Array, "micro rows seq"]
    segment_ids: Int[Array, "micro rows seq"]
    position_ids: Int[Array, "micro rows seq"]
