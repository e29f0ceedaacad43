"""Language-model heads that return logits or a loss, after OLMo-core's `LMHead`.

Names, defaults and semantics are those of `olmo_core.nn.lm_head`, with three differences: a z-loss
multiplier of 0.0 turns it off; with reduction "none" the z-loss of ignored labels is zero; the normalized
head has a fused loss, too.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.inputs.positions import keep_positions
from llama_jax.loss import IGNORE_INDEX, Reduction, fused_linear_cross_entropy
from llama_jax.models.layers import RMSNorm, parameter
from llama_jax.numerics.matmul import einsum, working_dtype

LossImplementation = Literal["default", "fused_linear"]


class LMOutputWithLoss(NamedTuple):
    """What an `LMHead` returns with labels.

    Attributes:
        logits: None unless `return_logits`.
        loss: `ce_loss` + `z_loss`.
        ce_loss: the cross-entropy, without a gradient.
        z_loss: the z-loss, without a gradient; None if it is off.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LMHead
        >>> head = LMHead(d_model=8, vocab_size=32, rngs=nnx.Rngs(0))
        >>> labels = jnp.array([[1, 2, -100]])
        >>> out = head(jnp.zeros((1, 3, 8)), labels=labels, z_loss_multiplier=1e-4)
        >>> out.logits.shape, out.loss.shape
        ((1, 3, 32), ())
    """

    logits: Float[Array, "batch kept vocab"] | None
    loss: Float[Array, "..."]
    ce_loss: Float[Array, "..."]
    z_loss: Float[Array, "..."] | None


@dataclass(frozen=True)
class RMSNormConfig:
    """An RMSNorm in front of the projection, for `LMHeadConfig.layer_norm`.

    Attributes:
        eps: added to the mean of squares.

    Examples:
        >>> from llama_jax import LMHeadConfig, RMSNormConfig
        >>> LMHeadConfig(layer_norm=RMSNormConfig(eps=1e-6)).num_params(d_model=8, vocab_size=32)
        296
    """

    eps: float = 1e-5

    def num_params(self, d_model: int) -> int:
        """One weight per feature."""
        return d_model


@dataclass(frozen=True)
class LMHeadConfig:
    """Which head to build.

    Attributes:
        name: "default" or "normalized" (nGPT, arXiv:2410.01131).
        layer_norm: applied to every position before the projection; "default" only.
        bias: None is True for "default" and False for "normalized", for which True is an error.
        dtype: of the weights.
        loss_implementation: "fused_linear" computes the loss without holding the logits.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LMHeadConfig
        >>> config = LMHeadConfig(name="normalized", loss_implementation="fused_linear")
        >>> head = config.build(d_model=8, vocab_size=32, rngs=nnx.Rngs(0))
        >>> head(jnp.zeros((1, 3, 8))).shape
        (1, 3, 32)
    """

    name: Literal["default", "normalized"] = "default"
    layer_norm: RMSNormConfig | None = None
    bias: bool | None = None
    dtype: str = "float32"
    loss_implementation: LossImplementation = "default"

    def __post_init__(self) -> None:
        if self.name not in ("default", "normalized"):
            raise ValueError(f"name: found {self.name!r}, expected 'default' or 'normalized'")
        if self.loss_implementation not in ("default", "fused_linear"):
            raise ValueError(
                f"loss_implementation: found {self.loss_implementation!r}, expected 'default' or "
                "'fused_linear'"
            )
        if self.name == "normalized":
            if self.bias:
                raise ValueError("bias: found True, expected None or False for the normalized head")
            if self.layer_norm is not None:
                raise ValueError(
                    f"layer_norm: found {self.layer_norm}, expected None for the normalized head"
                )

    @property
    def has_bias(self) -> bool:
        """Whether the built head has a bias."""
        return self.name != "normalized" if self.bias is None else self.bias

    def num_params(self, d_model: int, vocab_size: int) -> int:
        """Parameters of the built head."""
        norm = 0 if self.layer_norm is None else self.layer_norm.num_params(d_model)
        columns = self.has_bias + (self.name == "normalized")
        return norm + d_model * vocab_size + vocab_size * columns

    def build(
        self, *, d_model: int, vocab_size: int, rngs: nnx.Rngs, stddev: float = 0.02
    ) -> "LMHead":
        """Build the head, its weight random normal with `stddev`; a "normalized" head has unit rows."""
        dtype = jnp.dtype(self.dtype)
        if self.name == "normalized":
            return NormalizedLMHead(
                d_model=d_model,
                vocab_size=vocab_size,
                loss_implementation=self.loss_implementation,
                stddev=stddev,
                dtype=dtype,
                rngs=rngs,
            )
        return LMHead(
            d_model=d_model,
            vocab_size=vocab_size,
            layer_norm=self.layer_norm,
            bias=self.has_bias,
            loss_implementation=self.loss_implementation,
            stddev=stddev,
            dtype=dtype,
            rngs=rngs,
        )


class LMHead(nnx.Module):
    """Logits norm(x) weight^T + bias, with weight [vocab, d_model], or their loss.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import LMHead
        >>> head = LMHead(d_model=8, vocab_size=32, bias=False, rngs=nnx.Rngs(0))
        >>> head(jnp.zeros((1, 3, 8))).shape
        (1, 3, 32)
    """

    def __init__(
        self,
        *,
        d_model: int,
        vocab_size: int,
        layer_norm: RMSNormConfig | None = None,
        bias: bool = True,
        loss_implementation: LossImplementation = "default",
        stddev: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.loss_implementation = loss_implementation
        if layer_norm is not None:
            self.norm = RMSNorm(d_model, layer_norm.eps, stack=(), dtype=dtype, rngs=rngs)
        normal, zeros = nnx.initializers.normal(stddev), nnx.initializers.zeros
        self.weight = parameter(rngs, (vocab_size, d_model), ("vocab", "embed"), normal, dtype)
        if bias:
            self.bias = parameter(rngs, (vocab_size,), ("vocab",), zeros, dtype)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        *,
        labels: Int[Array, "batch seq"] | None = None,
        ignore_index: int = IGNORE_INDEX,
        loss_reduction: Reduction = "mean",
        z_loss_multiplier: float | None = None,
        loss_div_factor: Any = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Array = 0,
    ) -> Array | LMOutputWithLoss:
        """Logits [batch, kept, vocab] without labels, else `LMOutputWithLoss`. Labels are not shifted.

        Args:
            labels: token ids; `ignore_index` is ignored.
            loss_reduction: `reduction` of `fused_linear_cross_entropy`, which also describes the next two.
            return_logits: with labels, whether to return the logits, too. Default: True for the "default"
                loss and False for "fused_linear", which otherwise never holds [batch, kept, vocab].
            logits_to_keep: 0 for all positions, N for the last N of x and labels, or an index array [kept]
                or [batch, kept] for both. The norm comes first.

        Raises:
            ValueError: `return_logits=False` without labels, or as `fused_linear_cross_entropy`.
        """
        hidden = keep_positions(self.norm(x) if hasattr(self, "norm") else x, logits_to_keep)
        bias = self.bias[...] if hasattr(self, "bias") else None
        weight, scale = self.weight[...], self.scale()
        if labels is None:
            if return_logits is False:
                raise ValueError("return_logits: found False without labels; pass labels, too")
            return _logits(hidden, weight, bias, scale)
        fused = self.loss_implementation == "fused_linear"
        out = fused_linear_cross_entropy(
            hidden,
            weight,
            keep_positions(labels, logits_to_keep),
            bias=bias,
            scale=scale,
            ignore_index=ignore_index,
            reduction=loss_reduction,
            z_loss=z_loss_multiplier,
            loss_div_factor=loss_div_factor,
            mode="auto" if fused else "reference",
            vocab_axis=0,
        )
        if return_logits is None:
            return_logits = not fused
        return LMOutputWithLoss(
            logits=_logits(hidden, weight, bias, scale) if return_logits else None,
            loss=out.loss,
            ce_loss=out.ce_loss,
            z_loss=out.z_loss if z_loss_multiplier else None,
        )

    def scale(self) -> Array | None:
        """A factor per column of the logits, or None."""
        return None


class NormalizedLMHead(LMHead):
    """nGPT's head: logits = (sz * sqrt(d_model)) * (x weight^T), no norm, no bias.

    `sz` [vocab] starts at 1 / sqrt(d_model), so the effective scale starts at 1. Rows of the weight start
    with length 1; after each optimizer step the caller replaces the weight by `normalize_rows(weight)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from llama_jax import NormalizedLMHead, normalize_rows
        >>> head = NormalizedLMHead(d_model=8, vocab_size=32, rngs=nnx.Rngs(0))
        >>> head(jnp.zeros((1, 3, 8))).shape
        (1, 3, 32)
        >>> head.weight[...] = normalize_rows(head.weight[...])  # after an optimizer step
    """

    def __init__(
        self,
        *,
        d_model: int,
        vocab_size: int,
        loss_implementation: LossImplementation = "default",
        stddev: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.loss_implementation = loss_implementation
        normal = nnx.initializers.normal(stddev)

        def rows(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return normalize_rows(normal(key, shape, dtype))

        start = nnx.initializers.constant(1 / math.sqrt(d_model))
        self.weight = parameter(rngs, (vocab_size, d_model), ("vocab", "embed"), rows, dtype)
        self.sz = parameter(rngs, (vocab_size,), ("vocab",), start, dtype)

    def scale(self) -> Array:
        """sz * sqrt(d_model), a factor per column."""
        sz = self.sz[...]
        return sz.astype(working_dtype(sz.dtype)) * math.sqrt(self.weight.shape[-1])


def normalize_rows(weight: Float[Array, "rows size"]) -> Float[Array, "rows size"]:
    """Each row divided by its length, computed in float32 (float64 for float64).

    Examples:
        >>> import jax.numpy as jnp
        >>> from llama_jax import normalize_rows
        >>> normalize_rows(jnp.array([[3.0, 4.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    wide = weight.astype(working_dtype(weight.dtype))
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(weight.dtype)


def _logits(hidden: Array, weight: Array, bias: Array | None, scale: Array | None) -> Array:
    working = working_dtype(hidden.dtype)
    logits = einsum("bsh,vh->bsv", hidden, weight, out_dtype=working)
    if scale is not None:
        logits = logits * jnp.broadcast_to(scale, logits.shape)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(working), logits.shape)
    return logits.astype(hidden.dtype)
