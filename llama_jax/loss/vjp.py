"""The derivative of the fused loss: which pass forms which gradient.

With "sum" and "mean" all tokens share one cotangent, so the forward pass forms the gradients with a
cotangent of 1 while it has the logits, and the backward pass scales them. With one cotangent per token,
gradients that sum over tokens have to wait for it, while a row of the hidden states' gradient can be
scaled afterwards.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax.loss.operands import Gradients, Head, Losses, NeedsGradient, Tokens
from llama_jax.loss.options import Options
from llama_jax.loss.reduction import Reduced, reduce_losses
from llama_jax.loss.scan import losses_and_gradients


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_losses(
    options: Options, tokens: Tokens, head: Head, divisor: Float[Array, ""] | None
) -> Reduced:
    """The losses, weighted by `tokens.weights`, reduced, and divided by `divisor` if there is one."""
    losses, _ = losses_and_gradients(options, NeedsGradient(), tokens._replace(weights=None), head)
    assert losses is not None
    return reduce_losses(options, losses, tokens, divisor)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    """What the backward pass must know when it is traced.

    Attributes:
        needs_weights: whether the weights are differentiated.
        dtypes: of hidden, kernel, bias, scale and weights, which their gradients get.
    """

    needs: NeedsGradient
    needs_weights: bool
    dtypes: tuple[np.dtype[Any] | None, ...]


class _Residuals(NamedTuple):
    """`operands` where gradients are still to be formed, else `gradients` for a cotangent of 1."""

    operands: tuple[Tokens, Head] | None
    losses: Losses
    gradients: Gradients
    weights: Float[Array, "*tokens"] | None
    divisor: Float[Array, ""] | None
    static: _Static


def _forward(options: Options, tokens: Any, head: Any, divisor: Any) -> tuple[Reduced, _Residuals]:
    """Of the arguments each array is a `CustomVJPPrimal`: its value, and whether it is differentiated."""
    perturbed_tokens, perturbed_head = jax.tree.map(lambda leaf: leaf.perturbed, (tokens, head))
    tokens, head, divisor = jax.tree.map(lambda leaf: leaf.value, (tokens, head, divisor))
    needs = NeedsGradient(
        hidden=perturbed_tokens.hidden,
        kernel=perturbed_head.kernel,
        bias=bool(perturbed_head.bias),
        scale=bool(perturbed_head.scale),
    )
    needs_head = needs.kernel or needs.bias or needs.scale
    in_backward = options.recompute or (options.per_token and needs_head)
    # Weights and divisor multiply once, before the gradient is rounded, so that with a cotangent of 1 the
    # backward pass has nothing left to do. Per token they multiply the cotangent instead.
    factors = None if options.per_token else _token_factors(tokens, divisor)
    needs_now = NeedsGradient() if in_backward else needs
    losses, gradients = losses_and_gradients(
        options, needs_now, tokens._replace(weights=factors), head
    )
    assert losses is not None
    arrays = (tokens.hidden, *head, tokens.weights)
    dtypes = tuple(None if array is None else array.dtype for array in arrays)
    residuals = _Residuals(
        operands=(tokens, head) if in_backward else None,
        losses=losses,
        gradients=gradients,
        weights=tokens.weights,
        divisor=divisor,
        static=_Static(needs, bool(perturbed_tokens.weights), dtypes),
    )
    return reduce_losses(options, losses, tokens, divisor), residuals


def _backward(
    options: Options, residuals: _Residuals, cotangents: Reduced
) -> tuple[Any, Any, None]:
    operands, losses, gradients, weights, divisor, static = residuals
    # fused_linear_cross_entropy stops the gradients of ce and z
    cotangent: Any = cotangents.total
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    cotangent = cotangent.astype(losses.ce.dtype)
    d_weights = None
    if static.needs_weights:
        d_weights = cotangent * (losses.ce + losses.z)
        d_weights = d_weights if divisor is None else d_weights / divisor
    if operands is not None:
        tokens, head = operands
        factors = _token_factors(tokens, divisor)
        cotangent = jnp.broadcast_to(cotangent, tokens.labels.shape)
        cotangent = cotangent if factors is None else cotangent * factors
        tokens = tokens._replace(weights=cotangent, logsumexp=losses.logsumexp)
        _, gradients = losses_and_gradients(options, static.needs, tokens, head)
    else:
        if weights is not None and options.per_token:
            cotangent = cotangent * weights
        cotangent = cotangent[..., None] if cotangent.ndim else cotangent
        scaled = (None if gradient is None else gradient * cotangent for gradient in gradients)
        gradients = Gradients(*scaled)
    casts: list[Any] = [
        None if gradient is None else gradient.astype(dtype)
        for gradient, dtype in zip((*gradients, d_weights), static.dtypes, strict=True)
    ]
    d_hidden, d_kernel, d_bias, d_scale, d_weights = casts
    # The layers' backward pass must wait for the head's gradients to be summed over the shards and cast,
    # or XLA may do both at the end and keep the complete float32 gradient of the kernel until then.
    d_hidden, d_kernel = jax.lax.optimization_barrier((d_hidden, d_kernel))
    no_gradient: Any = None
    return Tokens(d_hidden, no_gradient, d_weights), Head(d_kernel, d_bias, d_scale), None


fused_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _token_factors(
    tokens: Tokens, divisor: Float[Array, ""] | None
) -> Float[Array, "*tokens"] | None:
    """What each token's loss is multiplied by: its weight over the divisor. None is 1."""
    if divisor is None:
        return tokens.weights
    if tokens.weights is None:
        return jnp.broadcast_to(1 / divisor, tokens.labels.shape)
    return tokens.weights / divisor
