"""The same numbers as plain JAX, holding the logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama_jax.loss.chunk import masked_losses, shape_logits
from llama_jax.loss.operands import Head, Tokens
from llama_jax.loss.options import Options
from llama_jax.loss.reduction import Reduced, reduce_losses
from llama_jax.numerics.matmul import wide_einsum


def reference_losses(
    options: Options, tokens: Tokens, head: Head, divisor: Float[Array, ""] | None
) -> Reduced:
    """As `fused_losses`; can be differentiated any number of times, forwards too."""
    labels = tokens.labels
    valid = labels != options.ignore_index
    hidden = jnp.where(valid[..., None], tokens.hidden, 0).astype(options.matmul_dtype)
    token_axes = "abcdefg"[: hidden.ndim - 1]
    kernel_axes = "vh" if options.vocab_axis == 0 else "hv"
    spec = f"{token_axes}h,{kernel_axes}->{token_axes}v"
    kernel = head.kernel.astype(options.matmul_dtype)
    projection = wide_einsum(spec, hidden, kernel, options.working_dtype)
    logits, _ = shape_logits(options, head, projection)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    columns = jnp.where((labels >= 0) & (labels < options.vocab), labels, 0)[..., None]
    label_logit = jnp.take_along_axis(logits, columns, axis=-1)[..., 0]
    ce = logsumexp - (1 - options.label_smoothing) * label_logit
    if options.label_smoothing:
        ce = ce - options.label_smoothing * jnp.mean(logits, axis=-1)
    losses = masked_losses(options, ce, logsumexp, labels)
    return reduce_losses(options, losses, tokens, divisor)
