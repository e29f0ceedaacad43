"""The fused loss: head projection and cross-entropy that never hold all logits.

`fused` has the public functions; `vjp` says which pass forms which gradient, `scan` runs the chunks on
every shard, and `chunk` is the arithmetic of one of them.
"""

from llama_jax.loss.chunk_size import default_chunk
from llama_jax.loss.fused import (
    LossOutput,
    fused_linear_cross_entropy,
    shift_labels,
)
from llama_jax.loss.options import IGNORE_INDEX, Mode, Reduction

__all__ = [
    "IGNORE_INDEX",
    "LossOutput",
    "Mode",
    "Reduction",
    "default_chunk",
    "fused_linear_cross_entropy",
    "shift_labels",
]
