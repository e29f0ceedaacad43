"""RMSNorm, Linear, Attention, MLP, DecoderLayer: modules that hold weights around free functions.

Every parameter is declared once, by `parameter`: shape, logical axes and initializer together. Weights
have the layout of PyTorch, [out, in], and the names of transformers, so that a checkpoint is read without
a transpose. `stack` is the leading shape of stacked layers, () for a single one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from llama_jax.attention.cache import Store, write_layer
from llama_jax.attention.dispatch import attention
from llama_jax.attention.masks import AttentionMask
from llama_jax.config import LlamaConfig
from llama_jax.inputs.keys import require_rngs
from llama_jax.numerics.activations import ACTIVATIONS
from llama_jax.numerics.matmul import einsum, working_dtype
from llama_jax.numerics.rope import rotate
from llama_jax.sharding import RESIDUAL_AXES, SEQUENCE_AXIS, constrain, mesh_axes

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def parameter(
    rngs: Any,  # checked here, with an error of its own
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Initializer,
    dtype: jnp.dtype,
) -> nnx.Param:
    """One declaration: initial value from `init`, logical axis names kept as metadata `axes`.

    Leading dimensions of stacked layers need no names of their own: they are all 'layers'.
    """
    require_rngs(rngs)
    stacked = ("layers",) * (len(shape) - len(axes))
    return nnx.Param(init(rngs.params(), shape, dtype), axes=stacked + axes)


def rms_norm(
    x: Float[Array, "*batch hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*batch hidden"]:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467).

    Statistics in float32 (float64 for float64); the product with the weight after casting back, which is
    transformers' order.
    """
    wide = x.astype(working_dtype(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return _for_every_token(weight, x) * normed.astype(x.dtype)


def _for_every_token(
    parameter: Float[Array, " last"], x: Float[Array, "*batch last"]
) -> Float[Array, "*batch last"]:
    """Broadcast so that the gradient is summed in float32, not in the dtype of x."""
    wide = jnp.broadcast_to(parameter.astype(working_dtype(x.dtype)), x.shape)
    return wide.astype(x.dtype)


def linear(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None,
) -> Float[Array, "*batch out"]:
    """x weight^T + bias, accumulated in float32 and rounded once, after the bias."""
    # One axis of tokens is what products are fastest with on a CPU, backward most of all; but merged, a
    # sequence that is split over devices would be gathered.
    split = mesh_axes().present(SEQUENCE_AXIS)
    tokens = x if split else x.reshape(-1, x.shape[-1])
    batch = "abcdefgh"[: tokens.ndim - 1]
    blocked = x.shape[-2:-1] != (1,)  # not a step of decoding
    spec = f"{batch}i,oi->{batch}o"
    if bias is None:
        out = einsum(spec, tokens, weight, blocked=blocked)
    else:
        working = working_dtype(x.dtype)
        out = einsum(spec, tokens, weight, out_dtype=working, blocked=blocked)
        out = out + jnp.broadcast_to(bias.astype(working), out.shape)
    out = out.astype(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
    return checkpoint_name(out, "projection")  # for `remat`


def sliced_linear(
    x: Float[Array, "*batch in"],
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None,
    slices: int,
) -> Float[Array, "*batch out"]:
    """`linear` as a sum over `slices` of the input dimension, each rounded, in their order.

    This is what `pretraining_tp` > 1 asks for: the summation order of a tensor-parallel pretraining.
    """
    size = -(-x.shape[-1] // slices)
    starts = range(0, x.shape[-1], size)
    total = linear(x[..., :size], weight[:, :size], None)
    for start in starts[1:]:
        part = slice(start, start + size)
        total = total + linear(x[..., part], weight[:, part], None)
    return total if bias is None else total + _for_every_token(bias, total)


class RMSNorm(nnx.Module):
    """`rms_norm` and its weight."""

    def __init__(
        self, size: int, eps: float, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.eps = eps
        ones = nnx.initializers.ones
        self.weight = parameter(rngs, (*stack, size), ("embed",), ones, dtype)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Normalise the last axis."""
        return rms_norm(x, self.weight[...], self.eps)


class Linear(nnx.Module):
    """`linear`, its weight and, where asked for, its bias. `slices` > 1: `sliced_linear`."""

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

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Project the last axis."""
        bias = self.bias[...] if hasattr(self, "bias") else None
        if self.slices > 1:
            return sliced_linear(x, self.weight[...], bias, self.slices)
        return linear(x, self.weight[...], bias)


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
    """A projection of a decoder layer: what all seven have in common first, for `partial`."""
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
    """Rotary grouped-query self-attention with its four projections."""

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
        cos: Float[Array, "batch seq half"],
        sin: Float[Array, "batch seq half"],
        mask: AttentionMask,
        store: tuple[Store, Store] | None,
        layer: Int[Array, ""] | None,
        start: Int[Array, ""],
        dropout_key: Key[Array, ""] | None,
        implementation: str | None = None,
        output_weights: bool = False,
    ) -> tuple[
        Float[Array, "batch seq hidden"],
        Float[Array, "batch heads seq k"] | None,
        tuple[Store, Store] | None,
    ]:
        """Attend over this call's keys or, where `store` holds cached ones, over the cache.

        Args:
            store: keys and values of the cache, of all layers or, with `layer` None, of this one; or None.
            layer, start: where in the store this call's keys and values are written.
            implementation, output_weights: see `attention`.

        Returns:
            Output, attention weights where asked for, and the store with the new keys and values in it.
        """
        split = (*x.shape[:2], -1, self.head_dim)
        query = rotate(self.q_proj(x).reshape(split), cos, sin)
        key = rotate(self.k_proj(x).reshape(split), cos, sin)
        value = self.v_proj(x).reshape(split)
        query = constrain(query, "batch", "sequence", "heads", "hidden")
        key = constrain(key, "batch", "sequence", "kv_heads", "hidden")
        value = constrain(value, "batch", "sequence", "kv_heads", "hidden")
        if store is not None:
            keys, key = write_layer(store[0], layer, start, key)
            values, value = write_layer(store[1], layer, start, value)
            store = keys, values
            key, value = key.astype(query.dtype), value.astype(query.dtype)
        out, weights = attention(
            query,
            key,
            value,
            mask,
            implementation=implementation,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
            output_weights=output_weights,
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1)), weights, store


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

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Transform each token."""
        gate = ACTIVATIONS[self.hidden_act](self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


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
        cos: Float[Array, "batch seq half"],
        sin: Float[Array, "batch seq half"],
        mask: AttentionMask,
        store: tuple[Store, Store] | None,
        layer: Int[Array, ""] | None,
        start: Int[Array, ""],
        dropout_key: Key[Array, ""] | None,
        implementation: str | None = None,
        output_weights: bool = False,
    ) -> tuple[
        Float[Array, "batch seq hidden"],
        Float[Array, "batch heads seq k"] | None,
        tuple[Store, Store] | None,
    ]:
        """As `Attention.__call__`, with the two residual branches around it."""
        attended, weights, store = self.self_attn(
            self.input_layernorm(x),
            cos,
            sin,
            mask,
            store,
            layer,
            start,
            dropout_key,
            implementation,
            output_weights,
        )
        x = constrain(x + attended, *RESIDUAL_AXES)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, *RESIDUAL_AXES), weights, store
