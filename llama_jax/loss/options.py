"""What the parts of the fused loss hand to each other."""

from typing import Any, Literal, NamedTuple

IGNORE_INDEX = -100
"""Label of tokens without a loss, as in PyTorch."""

Reduction = Literal["mean", "sum", "none"]
"""How the losses of the tokens are combined; "none" returns them all."""

Mode = Literal["auto", "recompute", "reference"]
"""Where gradients are computed: see `mode` of `fused_linear_cross_entropy`."""


class Shards(NamedTuple):
    """How tokens and vocabulary are split: mesh axes of each, and the spec of the token dimensions."""

    mesh: Any
    tokens: tuple[str, ...]
    token_spec: tuple[tuple[str, ...] | None, ...]
    vocab: str | None
    token_size: int
    vocab_size: int


class Options(NamedTuple):
    """The static choices of one call."""

    per_token: bool
    vocab_axis: int
    vocab: int
    ignore_index: int
    z_loss: float
    smoothing: float
    softcap: float | None
    chunk: int
    recompute: bool
    shards: Shards | None


class Wanted(NamedTuple):
    """Which gradients someone asked for."""

    hidden: bool = False
    kernel: bool = False
    bias: bool = False
    scale: bool = False


class Gradients(NamedTuple):
    """Gradients in the working dtype, None where not wanted."""

    hidden: Any = None
    kernel: Any = None
    bias: Any = None
    scale: Any = None


class Losses(NamedTuple):
    """Per token, without weights, zero where ignored."""

    ce: Any
    z: Any
    logsumexp: Any
