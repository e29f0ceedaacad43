"""The arrays that the functions of the fused loss take and return.

C tokens in a chunk, H hidden, V vocabulary; `*tokens` are any leading dimensions.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Head(NamedTuple):
    """The projection, shared by all tokens.

    Attributes:
        kernel: [V, H] or [H, V]; `Options.vocab_axis` tells which.
        bias: added to the logits.
        scale: a scalar or [V], multiplies the projection before the bias.
    """

    kernel: Float[Array, "rows columns"]
    bias: Float[Array, " vocab"] | None
    scale: Float[Array, "*vocab"] | None


class Tokens(NamedTuple):
    """One entry per token.

    Attributes:
        weights: factor on each token's loss or, when gradients are formed, on its gradient; None is 1.
        logsumexp: of each token's logits, from an earlier pass; None before that pass.
    """

    hidden: Float[Array, "*tokens hidden"]
    labels: Int[Array, "*tokens"]
    weights: Float[Array, "*tokens"] | None
    logsumexp: Float[Array, "*tokens"] | None = None


class Losses(NamedTuple):
    """Per token, unweighted; zero where the label is ignored."""

    ce: Float[Array, "*tokens"]
    z: Float[Array, "*tokens"]
    logsumexp: Float[Array, "*tokens"]


class Gradients(NamedTuple):
    """In the working dtype; None where not needed."""

    hidden: Float[Array, "*tokens hidden"] | None = None
    kernel: Float[Array, "rows columns"] | None = None
    bias: Float[Array, " vocab"] | None = None
    scale: Float[Array, "*vocab"] | None = None


class NeedsGradient(NamedTuple):
    """Which arrays are differentiated."""

    hidden: bool = False
    kernel: bool = False
    bias: bool = False
    scale: bool = False
