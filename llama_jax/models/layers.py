"""RMSNorm, Linear, Attention, MLP, DecoderLayer: modules that hold weights for free functions.

Every parameter is declared once, by `parameter`: shape, logical axes and initializer together. Weights
have PyTorch's layout, [out, in], and transformers' names, so a checkpoint is read without a transpose.
`stack` is the leading shape of stacked layers, () for a single one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from llama_jax.attention.cache import LayerCache, UnstackedLayerCache
from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from llama_jax.config import LlamaConfig
from llama_jax.inputs.keys import require_rngs
from llama_jax.models.tensor_parallel import find_ring, gather_matmul, matmul_scatter
from llama_jax.numerics.activations import ACTIVATIONS
from llama_jax.numerics.few_rows import few_rows_matmul, multiply_in_memory, weight_in_memory
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.numerics.rope import rotate
from llama_jax.quantization.weight import QuantizedWeight
from llama_jax.sharding import RESIDUAL_AXES, SEQUENCE_AXIS, TENSOR_AXIS, constrain, mesh_axes

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def parameter(
    rngs: Any,  # checked here, with a better error than flax's
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Initializer,
    dtype: jnp.dtype,
) -> nnx.Param[Array]:
    """A parameter with its initial value from `init` and its logical axes as metadata `axes`.

    `axes` names the last dimensions of `shape`; those before it, of stacked layers, are all "layers".
    """
    require_rngs(rngs)
    stacked = ("layers",) * (len(shape) - len(axes))
    return nnx.Param(init(rngs.params(), shape, dtype), axes=stacked + axes)


def rms_norm(
    x: Float[Array, "*batch hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*batch hidden"]:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467).

    Statistics are float32 (float64 for float64); the weight is applied after casting back, in transformers'
    order.
    """
    wide = x.astype(working_dtype(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return _for_every_token(weight, x) * normed.astype(x.dtype)


def _for_every_token(
    parameter: Float[Array, " last"], x: Float[Array, "*batch last"]
) -> Float[Array, "*batch last"]:
    """`parameter` broadcast to x so that its gradient is summed in float32, not in the dtype of x."""
    wide = jnp.broadcast_to(parameter.astype(working_dtype(x.dtype)), x.shape)
    return wide.astype(x.dtype)


def linear(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"] | QuantizedWeight,
    bias: Float[Array, " out"] | None,
    reduce_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """x weight^T + bias, accumulated in float32 and rounded once, after the bias.

    `reduce_dtype` is for the gradient of the weight, see `matmul.weight_gradient`.
    """
    # CPU matmuls are fastest with a single axis of tokens, most of all in the backward pass; but merging
    # the axes would gather a sequence that is split over devices.
    is_split = mesh_axes().present(SEQUENCE_AXIS, TENSOR_AXIS)
    tokens = x if is_split else x.reshape(-1, x.shape[-1])
    batch = "abcdefgh"[: tokens.ndim - 1]
    out_dtype = _before_bias(x.dtype, bias)
    is_step = x.shape[-2:-1] == (1,)  # of decoding
    out = step_matmul(tokens, weight, out_dtype) if is_step and tokens.ndim == 2 else None
    if out is None:
        out = einsum(
            f"{batch}i,oi->{batch}o",
            tokens,
            weight[...],
            out_dtype=out_dtype,
            blocked=not is_step,
            reduce_dtype=reduce_dtype,
        )
    return _projected(out.reshape(*x.shape[:-1], out.shape[-1]), bias, x.dtype)


def step_matmul(
    x: Float[Array, "rows in"],
    weight: Float[Array, "out in"] | QuantizedWeight,
    out_dtype: jnp.dtype,
    *,
    is_head: bool = False,
) -> Float[Array, "rows out"] | None:
    """x weight^T of a decoding step, or None where XLA's matmul is the way: see `few_rows_matmul`."""
    if isinstance(weight, QuantizedWeight):
        in_memory = weight.in_memory(x)
        if in_memory is not None:
            return multiply_in_memory(x, [in_memory])[0].astype(out_dtype)
    return few_rows_matmul(x, weight[...], out_dtype, is_head=is_head)


def _step_matmuls(
    x: Float[Array, "rows in"], projections: Sequence["Linear"]
) -> tuple[Float[Array, "rows _"], ...] | None:
    """x through several projections in one call of a kernel, or None where there is none."""
    weights = []
    for projection in projections:
        if type(projection) is not Linear or projection.slices > 1:
            return None
        weight: Any = projection.weight  # or codes in its place
        is_codes = isinstance(weight, QuantizedWeight)
        in_memory = weight.in_memory(x) if is_codes else weight_in_memory(x, weight[...])
        if in_memory is None:
            return None
        weights.append(in_memory)
    biases = [
        projection.bias[...] if hasattr(projection, "bias") else None for projection in projections
    ]
    outs = zip(multiply_in_memory(x, weights), biases, strict=True)
    return tuple(
        _projected(out.astype(_before_bias(x.dtype, bias)), bias, x.dtype) for out, bias in outs
    )


def _before_bias(dtype: jnp.dtype, *biases: Array | None) -> jnp.dtype:
    """The dtype of a matmul to which a bias will be added: it is rounded once, after that."""
    return dtype if all(bias is None for bias in biases) else working_dtype(dtype)


def _projected(out: Array, bias: Array | None, dtype: jnp.dtype) -> Array:
    """The result of a projection's matmul with its bias, in `dtype`."""
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(out.dtype), out.shape)
    return out.astype(dtype)


def sliced_linear(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None,
    slices: int,
    reduce_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """`linear` as a sum over `slices` of the input dimension, in order, each rounded.

    This is what `pretraining_tp` > 1 means: the summation order of tensor-parallel pretraining.
    """
    size = -(-x.shape[-1] // slices)
    starts = range(0, x.shape[-1], size)
    total = linear(x[..., :size], weight[:, :size], None, reduce_dtype)
    for start in starts[1:]:
        part = slice(start, start + size)
        total = total + linear(x[..., part], weight[:, part], None, reduce_dtype)
    return total if bias is None else total + _for_every_token(bias, total)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCall:
    """What all layers of one forward pass share.

    Attributes:
        cos, sin: of the rotation angles of each position, see `rope_cos_sin`.
        mask: who attends to whom.
        attention_implementation: see `attention`.
        output_attentions: return the attention weights.
        reduce_dtype: see `LlamaModel.__call__`.
    """

    cos: Float[Array, "batch seq half"]
    sin: Float[Array, "batch seq half"]
    mask: AttentionMask
    attention_implementation: str | None = field(default=None, metadata={"static": True})
    output_attentions: bool = field(default=False, metadata={"static": True})
    reduce_dtype: DTypeLike | None = field(default=None, metadata={"static": True})


class LayerOutput(NamedTuple):
    """Hidden states, the updated cache, and attention weights if `LayerCall` asks for them."""

    hidden: Float[Array, "batch seq hidden"]
    cache: LayerCache | UnstackedLayerCache | None
    attention_weights: Float[Array, "batch heads seq k"] | None


class RMSNorm(nnx.Module):
    """`rms_norm` and its weight."""

    def __init__(
        self, size: int, eps: float, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.eps = eps
        ones = nnx.initializers.ones
        self.weight = parameter(rngs, (*stack, size), ("embed",), ones, dtype)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Normalize the last axis."""
        return rms_norm(x, self.weight[...], self.eps)


class Linear(nnx.Module):
    """`linear`, or with `slices` > 1 `sliced_linear`, with its weight and optional bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        *,
        use_bias: bool,
        slices: int,
        stddev: float,
        stack: tuple[int, ...],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.slices = slices
        normal, zeros = nnx.initializers.normal(stddev), nnx.initializers.zeros
        self.weight = parameter(rngs, (*stack, out_features, in_features), axes, normal, dtype)
        if use_bias:
            self.bias = parameter(rngs, (*stack, out_features), axes[:1], zeros, dtype)

    def __call__(
        self, x: Float[Array, "*batch in"], reduce_dtype: DTypeLike | None = None
    ) -> Float[Array, "*batch out"]:
        """Project the last axis."""
        if self.slices > 1:
            return sliced_linear(x, *self.arrays(), self.slices, reduce_dtype)
        weight: Any = self.weight  # or codes in its place
        if not isinstance(weight, QuantizedWeight):
            weight = weight[...]
        return linear(x, weight, self.bias[...] if hasattr(self, "bias") else None, reduce_dtype)

    def arrays(self) -> tuple[Float[Array, "out in"], Float[Array, " out"] | None]:
        """Weight and bias."""
        return self.weight[...], self.bias[...] if hasattr(self, "bias") else None


@jax.custom_jvp
def _gathered(weight: Float[Array, "out in"]) -> Float[Array, "out in"]:
    """`weight`, gathered over the axes that split tokens; its gradient is not.

    Otherwise XLA gathers the weights of attention once more for the gradient of their input, after they
    were gathered to compute the layer again.
    """
    return constrain(weight, "heads", "hidden")


_gathered.defjvp(lambda primals, tangents: (_gathered(*primals), *tangents))


def project_in(
    x: Float[Array, "batch seq in"], *projections: Linear, reduce_dtype: DTypeLike | None
) -> tuple[Float[Array, "batch seq out"], ...]:
    """`x`, from the residual stream, through several projections; where it is split, gathered once."""
    if x.shape[1] == 1:
        outs = _step_matmuls(x[:, 0], projections)
        if outs is not None:
            return tuple(out[:, None] for out in outs)
    if any(projection.slices > 1 for projection in projections) or not mesh_axes().sizes:
        return tuple(projection(x, reduce_dtype) for projection in projections)
    weights, biases = zip(*(projection.arrays() for projection in projections), strict=True)
    ring = find_ring(*x.shape[:2], *(len(weight) for weight in weights))
    if ring is None:
        if x.shape[1] > 1:  # of one token, x is smaller than the weights
            weights = tuple(_gathered(weight) for weight in weights)
        return tuple(
            linear(x, weight, bias, reduce_dtype)
            for weight, bias in zip(weights, biases, strict=True)
        )
    outs = gather_matmul(ring, _before_bias(x.dtype, *biases), reduce_dtype, x, weights)
    return tuple(_projected(out, bias, x.dtype) for out, bias in zip(outs, biases, strict=True))


def project_out(
    x: Float[Array, "batch seq in"], projection: Linear, reduce_dtype: DTypeLike | None
) -> Float[Array, "batch seq out"]:
    """`x` through a projection to the residual stream; summed and split in one step where that is split."""
    ring = find_ring(*x.shape)
    if ring is None or projection.slices > 1:
        return projection(x, reduce_dtype)
    weight, bias = projection.arrays()
    out = matmul_scatter(ring, _before_bias(x.dtype, bias), reduce_dtype, x, weight)
    return _projected(out, bias, x.dtype)


def _projection(
    config: LlamaConfig,
    use_bias: bool,
    stack: tuple[int, ...],
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    in_features: int,
    out_features: int,
    axes: tuple[str, str],
    slices: int = 1,
) -> Linear:
    """A projection of a decoder layer. What all seven share comes first, for `partial`."""
    return Linear(
        in_features,
        out_features,
        axes,
        use_bias=use_bias,
        slices=slices,
        stddev=config.initializer_range,
        stack=stack,
        dtype=dtype,
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary embeddings and four projections."""

    def __init__(
        self, config: LlamaConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.head_dim = config.head_size
        self.dropout_rate = float(config.attention_dropout or 0.0)
        hidden = config.hidden_size
        heads = config.num_attention_heads * config.head_size
        kv_heads = config.kv_heads * config.head_size

        project = partial(_projection, config, config.attention_bias, stack, dtype, rngs)
        self.q_proj = project(hidden, heads, ("heads", "embed"))
        self.k_proj = project(hidden, kv_heads, ("kv_heads", "embed"))
        self.v_proj = project(hidden, kv_heads, ("kv_heads", "embed"))
        self.o_proj = project(heads, hidden, ("embed", "heads"), config.pretraining_tp or 1)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        call: LayerCall,
        cache: LayerCache | UnstackedLayerCache | None = None,
        dropout_key: Key[Array, "*rows"] | None = None,
    ) -> LayerOutput:
        """Attend to this call's keys or, with a cache, to all that it holds."""
        by_head = (*x.shape[:2], -1, self.head_dim)
        projected = project_in(
            x, self.q_proj, self.k_proj, self.v_proj, reduce_dtype=call.reduce_dtype
        )
        # names are for remat policies, see `llama_jax.numerics.remat_policy`
        query, key, value = (
            checkpoint_name(out, name).reshape(by_head)
            for out, name in zip(projected, ("query", "key", "value"), strict=True)
        )
        query, key = (rotate(heads, call.cos, call.sin) for heads in (query, key))
        query = constrain(query, "batch", "sequence", "heads", "hidden")
        key = constrain(key, "batch", "sequence", "kv_heads", "hidden")
        value = constrain(value, "batch", "sequence", "kv_heads", "hidden")
        if cache is not None:
            cache, key, value = cache.update(key, value)
            if call.mask.query_slots is None:  # a new cache, with no other tokens
                key, value = key[:, : x.shape[1]], value[:, : x.shape[1]]
            key, value = key.astype(query.dtype), value.astype(query.dtype)
        out, weights = attention(
            query,
            key,
            value,
            call.mask,
            implementation=call.attention_implementation,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
            output_weights=call.output_attentions,
        )
        out = project_out(out.reshape(*x.shape[:2], -1), self.o_proj, call.reduce_dtype)
        return LayerOutput(checkpoint_name(out, "output"), cache, weights)


class MLP(nnx.Module):
    """The gated feed-forward network down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(
        self, config: LlamaConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.hidden_act = config.hidden_act

        project = partial(_projection, config, config.mlp_bias, stack, dtype, rngs)
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = project(hidden, intermediate, ("mlp", "embed"))
        self.up_proj = project(hidden, intermediate, ("mlp", "embed"))
        slices = config.pretraining_tp or 1
        self.down_proj = project(intermediate, hidden, ("embed", "mlp"), slices)

    def __call__(
        self, x: Float[Array, "batch seq hidden"], reduce_dtype: DTypeLike | None = None
    ) -> Float[Array, "batch seq hidden"]:
        """Transform each token."""
        gate, up = project_in(x, self.gate_proj, self.up_proj, reduce_dtype=reduce_dtype)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        activated = ACTIVATIONS[self.hidden_act](gate) * up
        return checkpoint_name(project_out(activated, self.down_proj, reduce_dtype), "down")


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: LlamaConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        def norm() -> RMSNorm:
            eps = config.rms_norm_eps
            return RMSNorm(config.hidden_size, eps, stack=stack, dtype=dtype, rngs=rngs)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, stack=stack, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        call: LayerCall,
        cache: LayerCache | UnstackedLayerCache | None = None,
        dropout_key: Key[Array, "*rows"] | None = None,
    ) -> LayerOutput:
        """`Attention` and `MLP`, each behind a norm and with a residual connection around it."""
        attended = self.attend(checkpoint_name(x, "input"), call, cache, dropout_key)
        return attended._replace(hidden=self.feed_forward(attended.hidden, call))

    def attend(
        self,
        x: Float[Array, "batch seq hidden"],
        call: LayerCall,
        cache: LayerCache | UnstackedLayerCache | None = None,
        dropout_key: Key[Array, "*rows"] | None = None,
    ) -> LayerOutput:
        """The first half of the layer."""
        out = self.self_attn(self.input_layernorm(x), call, cache, dropout_key)
        return out._replace(hidden=constrain(x + out.hidden, *RESIDUAL_AXES))

    def feed_forward(
        self, x: Float[Array, "batch seq hidden"], call: LayerCall
    ) -> Float[Array, "batch seq hidden"]:
        """The second half."""
        x = x + self.mlp(self.post_attention_layernorm(x), call.reduce_dtype)
        return constrain(x, *RESIDUAL_AXES)
