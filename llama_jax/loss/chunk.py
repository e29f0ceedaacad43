"""Loss and gradients of one chunk of tokens: the only place where logits exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.loss.operands import Gradients, Head, Losses, NeedsGradient, Tokens
from llama_jax.loss.options import Options
from llama_jax.loss.statistics import row_statistics
from llama_jax.numerics.matmul import wide_einsum


class Block(NamedTuple):
    """The logits of a chunk of tokens and of the columns of this shard.

    Attributes:
        hidden: operand of the matmul, zero where the label is ignored.
        kernel: operand of the matmul.
        projection: hidden @ kernel.
        logits: the projection scaled, biased and capped; -inf in padding columns.
        softcap_slope: derivative of the softcap, if there is one.
        in_vocab: false for padding columns; None where there are none.
        label_columns: the column of each label, outside [0, V) if another shard has it.
        valid: whether the label is not ignored.
    """

    hidden: Float[Array, "chunk hidden"]
    kernel: Float[Array, "rows columns"]
    projection: Float[Array, "chunk vocab"]
    logits: Float[Array, "chunk vocab"]
    softcap_slope: Float[Array, "chunk vocab"] | None
    in_vocab: Bool[Array, "1 vocab"] | None
    label_columns: Int[Array, " chunk"]
    valid: Bool[Array, " chunk"]


def add_chunk(
    options: Options, needs: NeedsGradient, head: Head, sums: Gradients, tokens: Tokens
) -> tuple[Gradients, tuple[Losses | None, Float[Array, "chunk hidden"] | None]]:
    """Body of a scan over chunks.

    Args:
        sums: gradients of the head over the chunks before this one; None where not needed.

    Returns:
        The gradients of the head with this chunk's added; the chunk's losses (None if `tokens` has the
        logsumexp of an earlier pass) and the gradient of its hidden states.
    """
    block = project(options, tokens, head)
    if tokens.logsumexp is None:
        losses = token_losses(options, block, tokens.labels)
        logsumexp = losses.logsumexp
    else:
        losses, logsumexp = None, tokens.logsumexp
    if not any(needs):
        return sums, (losses, None)

    gradient = logits_gradient(options, block, tokens.weights, logsumexp)
    if sums.bias is not None:
        sums = sums._replace(bias=sums.bias + jnp.sum(gradient, axis=0))
    if sums.scale is not None and head.scale is not None:
        by_column = jnp.sum(gradient * block.projection, axis=0)
        added = by_column if head.scale.ndim else jnp.sum(by_column)
        sums = sums._replace(scale=sums.scale + added)
    if head.scale is not None:
        gradient = gradient * jnp.broadcast_to(head.scale, gradient.shape)
    gradient = gradient.astype(options.matmul_dtype)

    vocab_first, dtype = options.vocab_axis == 0, options.working_dtype
    if sums.kernel is not None:
        if options.sum_vocab_axis == 0:
            added = wide_einsum("cv,ch->vh", gradient, block.hidden, dtype)
        else:
            added = wide_einsum("ch,cv->hv", block.hidden, gradient, dtype)
        sums = sums._replace(kernel=sums.kernel + added)
    d_hidden = None
    if needs.hidden:
        spec = "cv,vh->ch" if vocab_first else "cv,hv->ch"
        d_hidden = wide_einsum(spec, gradient, block.kernel, dtype)
    return sums, (losses, d_hidden)


def project(options: Options, tokens: Tokens, head: Head) -> Block:
    """Logits of a chunk."""
    valid = tokens.labels != options.ignore_index
    # inf and nan of ignored tokens would survive being multiplied by zero
    hidden = jnp.where(valid[:, None], tokens.hidden, 0).astype(options.matmul_dtype)
    kernel = head.kernel.astype(options.matmul_dtype)
    spec = "ch,vh->cv" if options.vocab_axis == 0 else "ch,hv->cv"
    projection = wide_einsum(spec, hidden, kernel, options.working_dtype)
    logits, softcap_slope = shape_logits(options, head, projection)
    in_vocab, label_columns = local_columns(options, projection.shape[1], tokens.labels)
    if in_vocab is not None:
        logits = jnp.where(in_vocab, logits, -jnp.inf)
    return Block(hidden, kernel, projection, logits, softcap_slope, in_vocab, label_columns, valid)


def shape_logits(
    options: Options, head: Head, projection: Float[Array, "*tokens vocab"]
) -> tuple[Float[Array, "*tokens vocab"], Float[Array, "*tokens vocab"] | None]:
    """The projection scaled, biased and capped and, with a softcap, the cap's derivative."""
    logits, shape = projection, projection.shape
    if head.scale is not None:
        logits = logits * jnp.broadcast_to(head.scale, shape)
    if head.bias is not None:
        logits = logits + jnp.broadcast_to(head.bias.astype(logits.dtype), shape)
    if options.softcap is None:
        return logits, None
    capped = jnp.tanh(logits / options.softcap)
    return options.softcap * capped, 1 - jnp.square(capped)


def local_columns(
    options: Options, width: int, labels: Int[Array, " chunk"]
) -> tuple[Bool[Array, "1 width"] | None, Int[Array, " chunk"]]:
    """Which of this shard's columns are in the vocabulary (None: all), and the labels as its columns."""
    shards = options.shards
    if shards is None or shards.vocab is None:
        return None, labels
    start = jax.lax.axis_index(shards.vocab) * width
    if options.vocab % shards.vocab_size == 0:
        return None, labels - start
    columns = start + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    return columns < options.vocab, labels - start


def token_losses(options: Options, block: Block, labels: Int[Array, " chunk"]) -> Losses:
    """Losses of a chunk; the sums over the vocabulary cross its shards."""
    logits, in_vocab = block.logits, block.in_vocab
    axis = options.shards.vocab if options.shards else None
    row_max, row_sum = row_statistics(logits, axis)
    columns = block.label_columns
    in_shard = (columns >= 0) & (columns < logits.shape[1])
    clipped = jnp.clip(columns, 0, logits.shape[1] - 1)[:, None]
    label_logit = jnp.where(in_shard, jnp.take_along_axis(logits, clipped, axis=-1)[:, 0], 0)
    sums = [row_sum, label_logit]
    if options.label_smoothing:
        unpadded = logits if in_vocab is None else jnp.where(in_vocab, logits, 0)
        sums.append(jnp.sum(unpadded, axis=-1))
    if axis:
        sums = list(jax.lax.psum(jnp.stack(sums), axis))
    logsumexp = row_max + jnp.log(sums[0])
    ce = logsumexp - (1 - options.label_smoothing) * sums[1]
    if options.label_smoothing:
        ce = ce - options.label_smoothing / options.vocab * sums[2]
    return masked_losses(options, ce, logsumexp, labels)


def masked_losses(
    options: Options,
    ce: Float[Array, "*tokens"],
    logsumexp: Float[Array, "*tokens"],
    labels: Int[Array, "*tokens"],
) -> Losses:
    """Cross-entropy and z-loss, 0 for ignored labels and NaN for those outside the vocabulary."""
    valid = labels != options.ignore_index
    inside = (labels >= 0) & (labels < options.vocab)
    ce = jnp.where(valid, jnp.where(inside, ce, jnp.nan), 0)
    z = jnp.where(valid, options.z_loss * jnp.square(logsumexp), 0)
    return Losses(ce, z, logsumexp)


def logits_gradient(
    options: Options,
    block: Block,
    weights: Float[Array, " chunk"] | None,
    logsumexp: Float[Array, " chunk"],
) -> Float[Array, "chunk vocab"]:
    """Gradient of the weighted losses with respect to the logits before the softcap."""
    logsumexp = jnp.where(block.valid, logsumexp, 0)[:, None]
    gradient = jnp.exp(block.logits - logsumexp)
    if options.z_loss:
        gradient = gradient * (1 + 2 * options.z_loss * logsumexp)
    if options.label_smoothing:
        uniform = options.label_smoothing / options.vocab
        in_vocab = block.in_vocab
        gradient = gradient - (uniform if in_vocab is None else jnp.where(in_vocab, uniform, 0))
    columns = jax.lax.broadcasted_iota(jnp.int32, gradient.shape, 1)
    is_label = columns == block.label_columns[:, None]
    gradient = jnp.where(is_label, gradient - (1 - options.label_smoothing), gradient)
    if weights is not None:
        gradient = gradient * weights[:, None]
    gradient = jnp.where(block.valid[:, None], gradient, 0)
    return gradient if block.softcap_slope is None else gradient * block.softcap_slope
