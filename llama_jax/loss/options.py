"""The static choices of one call of the fused loss."""

from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

IGNORE_INDEX = -100
"""Label of tokens without a loss, as in PyTorch."""

Reduction = Literal["mean", "sum", "none"]
"""How the losses of the tokens are combined; "none" returns them all."""

Mode = Literal["auto", "recompute", "reference"]
"""Where gradients are computed: see `mode` of `fused_linear_cross_entropy`."""


class Shards(NamedTuple):
    """How tokens and vocabulary are split over a mesh.

    Attributes:
        tokens: mesh axes that split the tokens.
        token_spec: the partition spec of the token dimensions.
        vocab: the mesh axis that splits the vocabulary, or None.
        hidden: mesh axes that split the hidden dimension of the kernel's gradient, as those of the
            parameter (`llama_jax.sharding`): some of `tokens`, since devices with different tokens hold
            different parts of a weight.
        token_size: into how many parts the tokens are split.
        vocab_size: into how many parts the vocabulary is split.
    """

    mesh: Mesh | AbstractMesh
    tokens: tuple[str, ...]
    token_spec: tuple[tuple[str, ...] | None, ...]
    vocab: str | None
    hidden: tuple[str, ...]
    token_size: int
    vocab_size: int


class Options(NamedTuple):
    """Hashable, so that functions can be compiled for it.

    Attributes:
        per_token: no reduction.
        vocab_axis: which axis of the kernel is the vocabulary.
        vocab: size of the vocabulary.
        z_loss: its factor; 0 is off.
        chunk: tokens per chunk.
        recompute: form all gradients in the backward pass.
        matmul_dtype: of the operands of every matmul.
        working_dtype: of logits, losses and accumulators.
        reduce_dtype: of the kernel's gradient while it is summed over the shards.
    """

    per_token: bool
    vocab_axis: int
    vocab: int
    ignore_index: int
    z_loss: float
    label_smoothing: float
    softcap: float | None
    chunk: int
    recompute: bool
    shards: Shards | None
    matmul_dtype: np.dtype[Any]
    working_dtype: np.dtype[Any]
    reduce_dtype: np.dtype[Any]

    @property
    def sum_vocab_axis(self) -> int:
        """Which axis of the kernel's gradient is the vocabulary while it is summed over the chunks.

        Where the shards then scatter its hidden dimension, that comes first: XLA for a GPU would have to
        transpose it all, as NCCL scatters the first dimension.
        """
        return 1 if self.shards is not None and self.shards.hidden else self.vocab_axis
