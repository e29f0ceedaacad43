"""Loss and gradients of one chunk of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llama_jax.loss.options import Gradients, Losses, Options, Wanted
from llama_jax.numerics.matmul import wide_einsum


def run_chunk(
    options: Options, wanted: Wanted, kernel, bias, scale, working, sums: Gradients, chunk
):
    """One chunk: its losses, its rows of the hidden states' gradient, the other gradients added up."""
    x, labels, weights, logsumexp = chunk
    valid = labels != options.ignore_index
    # inf and nan of ignored rows would survive a product with zero
    x = jnp.where(valid[:, None], x, 0)
    product = product_dtype(x, kernel)
    x, table = x.astype(product), kernel.astype(product)
    vocab_first = options.vocab_axis == 0
    raw = wide_einsum("ch,vh->cv" if vocab_first else "ch,hv->cv", x, table, working)
    logits, slope = shape_logits(options, raw, bias, scale)
    columns, own = label_columns(options, raw.shape[1], labels)
    real = None if columns is None else columns < options.vocab
    if real is not None:
        logits = jnp.where(real, logits, -jnp.inf)

    losses = None
    if logsumexp is None:
        losses = chunk_losses(options, logits, real, own, labels, valid)
        logsumexp = losses.logsumexp
    if not any(wanted):
        return sums, (losses, None)

    # d(ce + z) / d logits
    at_lse = jnp.where(valid, logsumexp, 0)[:, None]
    gradient = jnp.exp(logits - at_lse)
    if options.z_loss:
        gradient = gradient * (1 + 2 * options.z_loss * at_lse)
    if options.smoothing:
        even = options.smoothing / options.vocab
        gradient = gradient - (even if real is None else jnp.where(real, even, 0))
    places = jax.lax.broadcasted_iota(jnp.int32, raw.shape, 1)
    gradient = jnp.where(places == own[:, None], gradient - (1 - options.smoothing), gradient)
    if weights is not None:
        gradient = gradient * weights[:, None]
    gradient = jnp.where(valid[:, None], gradient, 0)
    if slope is not None:
        gradient = gradient * slope
    if wanted.bias:
        sums = sums._replace(bias=sums.bias + jnp.sum(gradient, axis=0))
    if wanted.scale:
        by_column = jnp.sum(gradient * raw, axis=0)
        added = by_column if scale.ndim else jnp.sum(by_column)
        sums = sums._replace(scale=sums.scale + added)
    if scale is not None:
        gradient = gradient * jnp.broadcast_to(scale, raw.shape)
    gradient = gradient.astype(product)
    if wanted.kernel:
        if vocab_first:
            added = wide_einsum("cv,ch->vh", gradient, x, working)
        else:
            added = wide_einsum("ch,cv->hv", x, gradient, working)
        sums = sums._replace(kernel=sums.kernel + added)
    rows = None
    if wanted.hidden:
        rows = wide_einsum("cv,vh->ch" if vocab_first else "cv,hv->ch", gradient, table, working)
    return sums, (losses, rows)


def chunk_losses(options: Options, logits, real, own, labels, valid) -> Losses:
    """Per-token losses of a chunk; the sums over the vocabulary cross its shards."""
    axis = options.shards.vocab if options.shards else None
    highest = jnp.max(logits, axis=-1)
    if axis:
        highest = jax.lax.pmax(highest, axis)
    # a row of -inf or with +inf must not turn into nan here rather than in the loss
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    mass = jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)
    here = (own >= 0) & (own < logits.shape[1])
    place = jnp.clip(own, 0, logits.shape[1] - 1)[:, None]
    chosen = jnp.where(here, jnp.take_along_axis(logits, place, axis=-1)[:, 0], 0)
    parts = [mass, chosen]
    if options.smoothing:
        parts.append(jnp.sum(logits if real is None else jnp.where(real, logits, 0), axis=-1))
    if axis:
        parts = list(jax.lax.psum(jnp.stack(parts), axis))
    lse = highest + jnp.log(parts[0])
    ce = lse - (1 - options.smoothing) * parts[1]
    if options.smoothing:
        ce = ce - options.smoothing / options.vocab * parts[2]
    inside = (labels >= 0) & (labels < options.vocab)
    ce = jnp.where(valid, jnp.where(inside, ce, jnp.nan), 0)
    z = jnp.where(valid, options.z_loss * jnp.square(lse), 0)
    return Losses(ce, z, lse)


def shape_logits(options: Options, raw, bias, scale):
    """Logits of the raw products and, with a softcap, its slope."""
    logits = raw if scale is None else raw * jnp.broadcast_to(scale, raw.shape)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(logits.dtype), raw.shape)
    if options.softcap is None:
        return logits, None
    bent = jnp.tanh(logits / options.softcap)
    return options.softcap * bent, 1 - jnp.square(bent)


def label_columns(options: Options, width: int, labels):
    """Global column numbers [1, width] where some are padding, and the labels as local columns."""
    shards = options.shards
    if shards is None or shards.vocab is None:
        return None, labels
    start = jax.lax.axis_index(shards.vocab) * width
    if options.vocab % shards.vocab_size == 0:
        return None, labels - start
    return start + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1), labels - start


def working_dtype(hidden: Array, kernel: Array) -> Any:
    """Of logits and losses: float64 where an operand is, else float32."""
    wide = jnp.float64 in (hidden.dtype, kernel.dtype)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def product_dtype(hidden: Array, kernel: Array) -> Any:
    """The one dtype of both, or the working dtype: nothing is narrowed."""
    return hidden.dtype if hidden.dtype == kernel.dtype else working_dtype(hidden, kernel)


def pad(values: Array, axis: int, missing: int, fill: Any = 0) -> Array:
    """`missing` more entries at the end of an axis."""
    if not missing:
        return values
    widths = [(0, missing if dimension == axis else 0) for dimension in range(values.ndim)]
    return jnp.pad(values, widths, constant_values=fill)
