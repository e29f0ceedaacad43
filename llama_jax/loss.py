"""The head projection and its cross-entropy as one function that never holds the logits.

`fused_linear_cross_entropy` works on chunks of tokens: a [chunk, vocab] block of logits is formed, turned
into losses and, in the same pass, into gradients, and forgotten (the idea of Liger Kernel,
arXiv:2410.10989, and of Cut Cross-Entropy, arXiv:2411.09009). Of this library it needs
the products and the names of mesh axes.

Notation: T tokens, H hidden, V vocabulary, C tokens per chunk; one unit is a product of 2 * T * H * V
flops. Products have operands of the input dtype and accumulate in float32; softmax and losses are
float32 (all of it float64 for float64 inputs).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax.matmul import wide_einsum
from llama_jax.platform import target_platform
from llama_jax.scalars import is_integer, is_number, plain_number
from llama_jax.sharding import BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS, mesh_axes

IGNORE_INDEX = -100

Reduction = Literal["mean", "sum", "none"]
Mode = Literal["auto", "recompute", "reference"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """`loss` = `ce_loss` + `z_loss`; the parts carry no gradient. Scalars, or [...] for "none".

    num_tokens: how many labels were not ignored.
    """

    loss: Float[Array, "*tokens"]
    ce_loss: Float[Array, "*tokens"]
    z_loss: Float[Array, "*tokens"]
    num_tokens: Int[Array, ""]


def fused_linear_cross_entropy(
    hidden: Float[Array, "*tokens hidden"],
    kernel: Float[Array, "a b"],
    labels: Int[Array, "*tokens"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    scale: Float[Array, "*vocab_or_scalar"] | float | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    z_loss: float | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    weights: Float[Array, "*tokens"] | None = None,
    loss_div_factor: Any = None,
    chunk: int | None = None,
    mode: Mode = "auto",
    vocab_axis: Literal[0, 1] | None = None,
    mesh: Any = None,
) -> LossOutput:
    """Cross-entropy of softcap(scale * (hidden @ kernel) + bias) against `labels`, plus z-loss.

    Args:
        hidden: [..., H] in float16, bfloat16, float32 or float64.
        kernel: [H, V], or [V, H] as a tied embedding has it; neither is transposed. Where it differs
            from `hidden` in dtype, products are done in the wider dtype of the two.
        labels: [...] integers; not shifted here. A label that is neither `ignore_index` nor in the
            vocabulary is an error outside jit and makes the loss NaN under it.
        bias: [V], added to the logits.
        scale: a scalar or [V], multiplies the projection before the bias.
        reduction: "sum" over tokens that are not ignored; "mean" divides that by their number (0 with
            zero gradients where there is none, where torch has NaN); "none" gives one loss a token, 0
            where ignored.
        z_loss: adds z_loss * logsumexp(logits)^2. Exactly off for None and 0.0.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        softcap: logits become softcap * tanh(logits / softcap).
        weights: [...], multiplies each token's losses. It does not change what "mean" divides by.
        loss_div_factor: divides all three losses after the reduction.
        chunk: tokens per chunk; None chooses by a byte budget (about 8 * C * V).
        mode: "auto"; "recompute" forms every gradient in the backward pass, from the logsumexp alone;
            "reference" is plain JAX that holds the logits and can be differentiated any number of
            times, forwards too.
        vocab_axis: which axis of `kernel` is the vocabulary; needed only where H = V.
        mesh: a mesh whose axes data, fsdp and sequence split the tokens and tensor the vocabulary;
            None takes the ambient one (`jax.set_mesh`). The leading dimension of `labels` is split over
            data and fsdp, the second over sequence (the first over all three where it is the only one).

    Cost in units: 1 where no gradient is wanted. "sum" and "mean" form gradients in the forward pass: 3,
    or 2 where only `hidden` (or only the kernel) has one; residuals are float32 gradients, O(T H + V H).
    "none" with a trainable kernel: 4, residual O(T); with a frozen one 2, residual O(T H). "recompute":
    4. Under a mesh, per chunk one pmax [C] and one psum [2..3, C] over the vocabulary; after the loop one
    psum of the gradient of `hidden` over the vocabulary and one of the kernel's over the tokens.

    Raises:
        ValueError: naming the argument, what was found and what was expected, when traced.
    """
    hidden, kernel = jnp.asarray(hidden), jnp.asarray(kernel)
    z_loss, label_smoothing, softcap = map(plain_number, (z_loss, label_smoothing, softcap))
    chunk, ignore_index, vocab_axis = map(plain_number, (chunk, ignore_index, vocab_axis))
    token_shape = hidden.shape[:-1]
    axis = _vocab_axis(hidden, kernel, vocab_axis)
    vocab = kernel.shape[axis]
    _validate(hidden, kernel, labels, vocab, bias, scale, weights, ignore_index, reduction, chunk)
    _validate_numbers(z_loss, label_smoothing, softcap, mode)
    labels = jnp.asarray(labels).astype(jnp.int32)
    working = _working_dtype(hidden, kernel)
    bias = None if bias is None else jnp.asarray(bias)
    scale = None if scale is None else jnp.asarray(scale).astype(working)
    weights = None if weights is None else jnp.asarray(weights).astype(working)
    shards = _find_shards(mesh, token_shape)
    vocab_shards = shards.vocab_size if shards else 1
    local_tokens = math.prod(token_shape) // (shards.token_size if shards else 1)
    options = _Options(
        per_token=reduction == "none",
        vocab_axis=axis,
        vocab=vocab,
        ignore_index=ignore_index,
        z_loss=float(z_loss or 0.0),
        smoothing=float(label_smoothing),
        softcap=None if softcap is None else float(softcap),
        chunk=min(chunk or default_chunk(-(-vocab // vocab_shards)), max(local_tokens, 1)),
        recompute=mode == "recompute",
        shards=shards,
    )
    num_tokens = jnp.sum(labels != ignore_index, dtype=jnp.int32)
    count = jnp.maximum(num_tokens, 1).astype(working) if reduction == "mean" else None
    # In float16 a gradient over the count would underflow before the loss scale lifts it, so there the
    # count divides afterwards, as part of the cotangent.
    late = _product_dtype(hidden, kernel) == jnp.float16
    run = _reference if mode == "reference" else _fused
    early_count = None if late else count
    losses = run(options, hidden, kernel, bias, scale, weights, labels, early_count)
    if count is not None and late:
        losses = tuple(loss / count for loss in losses)
    if loss_div_factor is not None:
        divisor = jnp.asarray(loss_div_factor).astype(working)
        losses = tuple(loss / divisor for loss in losses)
    total, ce, z = losses
    ce, z = jax.lax.stop_gradient((ce, z))
    return LossOutput(loss=total, ce_loss=ce, z_loss=z, num_tokens=num_tokens)


def shift_labels(labels: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Labels of the next token: the first dropped, IGNORE_INDEX put at the end (as transformers does)."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def default_chunk(vocab: int) -> int:
    """Tokens per chunk: a power of two for which the chunk's buffers stay within a byte budget.

    A chunk's logits and their gradients take about 8 bytes a column. A CPU wants them small, an
    accelerator wants products large enough to fill it.
    """
    budget = 1 << (27 if target_platform() == "cpu" else 30)
    return max(128, 1 << int(math.log2(max(budget // (8 * vocab), 1))))


# What follows is the algorithm. Within it tokens are one axis, and all static choices are one value.


class _Shards(NamedTuple):
    """How tokens and vocabulary are split: mesh axes of each, and the spec of the token dimensions."""

    mesh: Any
    tokens: tuple[str, ...]
    token_spec: tuple[tuple[str, ...] | None, ...]
    vocab: str | None
    token_size: int
    vocab_size: int


class _Options(NamedTuple):
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
    shards: _Shards | None


class _Wanted(NamedTuple):
    """Which gradients someone asked for."""

    hidden: bool = False
    kernel: bool = False
    bias: bool = False
    scale: bool = False


class _Gradients(NamedTuple):
    """Gradients in the working dtype, None where not wanted."""

    hidden: Any = None
    kernel: Any = None
    bias: Any = None
    scale: Any = None


class _Losses(NamedTuple):
    """Per token, without weights, zero where ignored."""

    ce: Any
    z: Any
    logsumexp: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(options: _Options, hidden, kernel, bias, scale, weights, labels, count):
    losses, _ = _run(options, _Wanted(), hidden, kernel, bias, scale, weights, labels, None)
    return _reduce(options, losses, weights, labels, count)


def _fused_forward(options: _Options, *arguments):
    hidden, kernel, bias, scale, weights, labels, count = (
        None if argument is None else argument.value for argument in arguments
    )
    asked = [argument is not None and argument.perturbed for argument in arguments]
    wanted = _Wanted(*asked[:4])
    # With a cotangent per token, gradients that sum over tokens must wait for it; a row of the
    # hidden states' gradient can be scaled when it comes.
    waits = options.per_token and (wanted.kernel or wanted.bias or wanted.scale)
    later = options.recompute or waits
    now = _Wanted() if later else wanted
    # Weights and count multiply once, before the gradient is rounded: with a cotangent of 1 nothing is
    # left to do in the backward pass. Per token they are part of the factor that comes later.
    early_weights = None if options.per_token else _divided(weights, count, labels)
    losses, gradients = _run(options, now, hidden, kernel, bias, scale, early_weights, labels, None)
    inputs = (hidden, kernel, bias, scale, weights, labels) if later else None
    dtypes = tuple(
        None if value is None else value.dtype for value in (hidden, kernel, bias, scale, weights)
    )
    residuals = (inputs, losses, gradients, weights, count, _Facts(wanted, asked[4], dtypes))
    return _reduce(options, losses, weights, labels, count), residuals


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Facts:
    """Static facts that go from the forward to the backward pass."""

    wanted: _Wanted
    weights: bool
    dtypes: tuple[Any, ...]


def _fused_backward(options: _Options, residuals, cotangents):
    inputs, losses, gradients, weights, count, facts = residuals
    # ce and z are for looking at: fused_linear_cross_entropy stops their gradient
    factor = cotangents[0]
    if isinstance(factor, jax.custom_derivatives.SymbolicZero):
        return (None,) * 7
    factor = factor.astype(losses.ce.dtype)
    d_weights = None
    if facts.weights:
        d_weights = factor * (losses.ce + losses.z)
        d_weights = d_weights if count is None else d_weights / count
    if inputs is not None:
        hidden, kernel, bias, scale, _, labels = inputs
        own = _divided(weights, count, labels)
        per_token = jnp.broadcast_to(factor, labels.shape)
        per_token = per_token if own is None else per_token * own
        _, gradients = _run(
            options,
            facts.wanted,
            hidden,
            kernel,
            bias,
            scale,
            per_token,
            labels,
            losses.logsumexp,
        )
    else:
        row = factor if weights is None or not options.per_token else factor * weights
        scaled = [
            None if g is None else g * (row[..., None] if row.ndim else row) for g in gradients
        ]
        gradients = _Gradients(*scaled)
    cast = [
        None if gradient is None else gradient.astype(dtype)
        for gradient, dtype in zip((*gradients, d_weights), facts.dtypes, strict=True)
    ]
    return (*cast, None, None)


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def _divided(weights: Any, count: Any, labels: Any) -> Any:
    """Each token's part of the loss: its weight over the count of "mean"."""
    if count is None:
        return weights
    return jnp.broadcast_to(1 / count, labels.shape) if weights is None else weights / count


def _reduce(options: _Options, losses: _Losses, weights: Array | None, labels, count: Array | None):
    """(loss, ce, z): weighted, per token, summed, or divided by the count."""
    ce, z = losses.ce, losses.z
    if weights is not None:
        ce, z = ce * weights, z * weights
    if not options.per_token:
        valid = labels != options.ignore_index
        ce, z = _total(ce, valid, count), _total(z, valid, count)
    return ce + z, ce, z


def _total(values: Array, valid: Array, count: Array | None) -> Array:
    """The sum of the valid values or, with a count, their mean.

    A long sum of like numbers loses bits that the sum of deviations from their mean keeps.
    """
    number = jnp.maximum(jnp.sum(valid), 1).astype(values.dtype) if count is None else count
    centre = jax.lax.stop_gradient(jnp.sum(values) / number)
    # an infinite loss must not come out as inf - inf
    centre = jnp.where(jnp.isfinite(centre), centre, 0)
    rest = jnp.sum(jnp.where(valid, values - centre, 0))
    return centre * number + rest if count is None else centre + rest / number


# Compiled here, so that calls outside jit compile once per shape; inlined within a caller's jit.
@partial(jax.jit, static_argnums=(0, 1))
def _run(
    options: _Options, wanted: _Wanted, hidden, kernel, bias, scale, weights, labels, logsumexp
) -> tuple[Any, _Gradients]:
    """`_run_local` on every shard, or directly where nothing is sharded.

    Args:
        weights: [...], factor on each token's gradient; None is 1.
        logsumexp: [...] from an earlier run; then only gradients are formed.
    """
    local = partial(_run_local, options, wanted)
    shards = options.shards
    if shards is None:
        return local(hidden, kernel, bias, scale, weights, labels, logsumexp)
    vocab = shards.vocab
    tokens = PartitionSpec(*shards.token_spec)
    rows = PartitionSpec(*shards.token_spec, None)
    columns = PartitionSpec(vocab)
    kernel_spec = PartitionSpec(*((vocab, None) if options.vocab_axis == 0 else (None, vocab)))
    per_column = scale is not None and scale.ndim == 1
    # a vocabulary that the shards do not divide is filled up with columns that count for nothing
    missing = -options.vocab % shards.vocab_size
    padded_kernel = _pad(kernel, options.vocab_axis, missing)
    padded_bias = None if bias is None else _pad(bias, 0, missing)
    padded_scale = _pad(scale, 0, missing) if per_column else scale
    losses_spec = None if logsumexp is not None else _Losses(tokens, tokens, tokens)
    gradients_spec = _Gradients(
        hidden=rows if wanted.hidden else None,
        kernel=kernel_spec if wanted.kernel else None,
        bias=columns if wanted.bias else None,
        scale=(columns if per_column else PartitionSpec()) if wanted.scale else None,
    )
    losses, gradients = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(
            rows,
            kernel_spec,
            None if bias is None else columns,
            (columns if per_column else PartitionSpec()) if scale is not None else None,
            None if weights is None else tokens,
            tokens,
            None if logsumexp is None else tokens,
        ),
        out_specs=(losses_spec, gradients_spec),
        axis_names={*shards.tokens, *((vocab,) if vocab else ())},
        check_vma=False,
    )(hidden, padded_kernel, padded_bias, padded_scale, weights, labels, logsumexp)
    return losses, _Gradients(
        hidden=gradients.hidden,
        kernel=None
        if gradients.kernel is None
        else jax.lax.slice_in_dim(gradients.kernel, 0, options.vocab, axis=options.vocab_axis),
        bias=None if gradients.bias is None else gradients.bias[: options.vocab],
        scale=gradients.scale[: options.vocab]
        if gradients.scale is not None and per_column
        else gradients.scale,
    )


def _run_local(
    options: _Options, wanted: _Wanted, hidden, kernel, bias, scale, weights, labels, logsumexp
) -> tuple[Any, _Gradients]:
    """Losses and the wanted gradients of this shard's tokens and columns, a chunk at a time."""
    token_shape = labels.shape
    working = _working_dtype(hidden, kernel)
    count = math.prod(token_shape)
    chunks = -(-count // options.chunk) if count else 1
    missing = chunks * options.chunk - count

    def split(values: Array | None, fill: Any) -> Array | None:
        if values is None:
            return None
        flat = _pad(values.reshape(count, *values.shape[len(token_shape) :]), 0, missing, fill)
        return flat.reshape(chunks, options.chunk, *flat.shape[1:])

    xs = (
        split(hidden, 0),
        split(labels, options.ignore_index),
        split(weights, 0),
        split(logsumexp, 0),
    )
    body = partial(_run_chunk, options, wanted, kernel, bias, scale, working)
    sums = _Gradients(
        kernel=jnp.zeros(kernel.shape, working) if wanted.kernel else None,
        bias=jnp.zeros(bias.shape, working) if wanted.bias else None,
        scale=jnp.zeros(scale.shape, working) if wanted.scale else None,
    )
    sums, (losses, rows) = jax.lax.scan(body, sums, xs)

    def join(values: Array) -> Array:
        flat = values.reshape(chunks * options.chunk, *values.shape[2:])
        return flat[:count].reshape(*token_shape, *values.shape[2:])

    losses = None if losses is None else _Losses(*map(join, losses))
    gradients = sums._replace(hidden=join(rows) if wanted.hidden else None)
    return losses, _sum_over_shards(options.shards, gradients)


def _sum_over_shards(shards: _Shards | None, gradients: _Gradients) -> _Gradients:
    """Tokens see every column, columns see every token: one collective for each gradient."""
    if shards is None:
        return gradients
    rows, kernel, bias, scale = gradients
    if rows is not None and shards.vocab:
        rows = jax.lax.psum(rows, shards.vocab)
    if shards.tokens:
        kernel, bias, scale = jax.lax.psum((kernel, bias, scale), shards.tokens)
    if scale is not None and scale.ndim == 0 and shards.vocab:
        scale = jax.lax.psum(scale, shards.vocab)
    return _Gradients(rows, kernel, bias, scale)


def _run_chunk(
    options: _Options, wanted: _Wanted, kernel, bias, scale, working, sums: _Gradients, chunk
):
    """One chunk: its losses, its rows of the hidden states' gradient, the other gradients added up."""
    x, labels, weights, logsumexp = chunk
    valid = labels != options.ignore_index
    # inf and nan of ignored rows would survive a product with zero
    x = jnp.where(valid[:, None], x, 0)
    product = _product_dtype(x, kernel)
    x, table = x.astype(product), kernel.astype(product)
    vocab_first = options.vocab_axis == 0
    raw = wide_einsum("ch,vh->cv" if vocab_first else "ch,hv->cv", x, table, working)
    logits, slope = _shape_logits(options, raw, bias, scale)
    columns, own = _columns(options, raw.shape[1], labels)
    real = None if columns is None else columns < options.vocab
    if real is not None:
        logits = jnp.where(real, logits, -jnp.inf)

    losses = None
    if logsumexp is None:
        losses = _chunk_losses(options, logits, real, own, labels, valid)
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


def _chunk_losses(options: _Options, logits, real, own, labels, valid) -> _Losses:
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
    return _Losses(ce, z, lse)


def _shape_logits(options: _Options, raw, bias, scale):
    """Logits of the raw products and, with a softcap, its slope."""
    logits = raw if scale is None else raw * jnp.broadcast_to(scale, raw.shape)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(logits.dtype), raw.shape)
    if options.softcap is None:
        return logits, None
    bent = jnp.tanh(logits / options.softcap)
    return options.softcap * bent, 1 - jnp.square(bent)


def _columns(options: _Options, width: int, labels):
    """Global column numbers [1, width] where some are padding, and the labels as local columns."""
    shards = options.shards
    if shards is None or shards.vocab is None:
        return None, labels
    start = jax.lax.axis_index(shards.vocab) * width
    if options.vocab % shards.vocab_size == 0:
        return None, labels - start
    return start + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1), labels - start


def _reference(options: _Options, hidden, kernel, bias, scale, weights, labels, count):
    """The same numbers as plain JAX, holding the logits."""
    working, product = _working_dtype(hidden, kernel), _product_dtype(hidden, kernel)
    valid = labels != options.ignore_index
    x = jnp.where(valid[..., None], hidden, 0).astype(product)
    tokens = "abcdefg"[: x.ndim - 1]
    table = "vh" if options.vocab_axis == 0 else "hv"
    spec = f"{tokens}h,{table}->{tokens}v"
    raw = wide_einsum(spec, x, kernel.astype(product), working)
    logits, _ = _shape_logits(options, raw, bias, scale)
    lse = jax.nn.logsumexp(logits, axis=-1)
    inside = (labels >= 0) & (labels < options.vocab)
    place = jnp.where(inside, labels, 0)[..., None]
    chosen = jnp.take_along_axis(logits, place, axis=-1)[..., 0]
    ce = lse - (1 - options.smoothing) * chosen
    if options.smoothing:
        ce = ce - options.smoothing * jnp.mean(logits, axis=-1)
    ce = jnp.where(valid, jnp.where(inside, ce, jnp.nan), 0)
    z = jnp.where(valid, options.z_loss * jnp.square(lse), 0)
    return _reduce(options, _Losses(ce, z, lse), weights, labels, count)


def _working_dtype(hidden: Array, kernel: Array) -> Any:
    wide = jnp.float64 in (hidden.dtype, kernel.dtype)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _product_dtype(hidden: Array, kernel: Array) -> Any:
    """The one dtype of both, or the working dtype: nothing is narrowed."""
    return hidden.dtype if hidden.dtype == kernel.dtype else _working_dtype(hidden, kernel)


def _pad(values: Array, axis: int, missing: int, fill: Any = 0) -> Array:
    if not missing:
        return values
    widths = [(0, missing if dimension == axis else 0) for dimension in range(values.ndim)]
    return jnp.pad(values, widths, constant_values=fill)


def _find_shards(mesh: Any, token_shape: tuple[int, ...]) -> _Shards | None:
    """The shards of `mesh` or of the ambient mesh; None where no axis of ours splits anything."""
    axes = mesh_axes(mesh)
    batch, sequence = axes.present(*BATCH_AXES), axes.present(SEQUENCE_AXIS)
    (vocab,) = axes.present(TENSOR_AXIS) or (None,)
    if not (batch or sequence or vocab):
        return None
    if len(token_shape) == 1:
        split: tuple[tuple[str, ...], ...] = (batch + sequence,)
    else:
        split = (batch, sequence, *((),) * (len(token_shape) - 2))
    for dimension, names in zip(token_shape, split, strict=True):
        parts = axes.size(*names)
        if dimension % parts:
            raise ValueError(
                f"labels: found shape {list(token_shape)}, expected {dimension} to be divisible by "
                f"the mesh axes {', '.join(names)} = {parts}"
            )
    tokens = batch + sequence
    return _Shards(
        mesh=axes.mesh,
        tokens=tokens,
        token_spec=tuple(names or None for names in split),
        vocab=vocab,
        token_size=axes.size(*tokens),
        vocab_size=axes.size(TENSOR_AXIS),
    )


def _vocab_axis(hidden: Array, kernel: Array, given: int | None) -> int:
    size = hidden.shape[-1]
    if kernel.ndim != 2 or size not in kernel.shape:
        raise ValueError(
            f"kernel: found shape {list(kernel.shape)}, expected [{size}, V] or [V, {size}] for "
            f"hidden {list(hidden.shape)}"
        )
    if given is None:
        if kernel.shape[0] == kernel.shape[1]:
            raise ValueError(f"vocab_axis: found None, expected 0 or 1 for a square kernel {size}")
        return 1 if kernel.shape[0] == size else 0
    if given not in (0, 1) or kernel.shape[1 - given] != size:
        raise ValueError(f"vocab_axis: found {given!r}, expected the axis that is not {size} long")
    return given


def _validate(
    hidden, kernel, labels, vocab, bias, scale, weights, ignore_index, reduction, chunk
) -> None:
    def wrong(name: str, found: Any, expected: str) -> ValueError:
        return ValueError(f"{name}: found {found}, expected {expected}")

    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise wrong(name, array.dtype, "a floating-point dtype")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise wrong("labels", labels.dtype, "an integer dtype")
    tokens = list(hidden.shape[:-1])
    if list(labels.shape) != tokens:
        raise wrong("labels", f"shape {list(labels.shape)}", f"{tokens}, as hidden has")
    if weights is not None and list(jnp.shape(weights)) != tokens:
        raise wrong("weights", f"shape {list(jnp.shape(weights))}", f"{tokens}, one a token")
    if bias is not None and bias.shape != (vocab,):
        raise wrong("bias", f"shape {list(bias.shape)}", f"[{vocab}]")
    if scale is not None and jnp.shape(scale) not in ((), (vocab,)):
        raise wrong("scale", f"shape {list(jnp.shape(scale))}", f"a scalar or [{vocab}]")
    if reduction not in ("mean", "sum", "none"):
        raise wrong("reduction", repr(reduction), "'mean', 'sum' or 'none'")
    if chunk is not None and (not is_integer(chunk) or chunk < 1):
        raise wrong("chunk", repr(chunk), "a positive integer")
    if not isinstance(labels, jax.core.Tracer):
        known = np.asarray(labels)
        outside = known[(known != ignore_index) & ((known < 0) | (known >= vocab))]
        if outside.size:
            raise wrong("labels", outside[0], f"{ignore_index} or 0 to {vocab - 1}")


def _validate_numbers(z_loss, label_smoothing, softcap, mode) -> None:
    for name, value, low, high in (
        ("z_loss", z_loss or 0.0, 0.0, math.inf),
        ("label_smoothing", label_smoothing, 0.0, 1.0),
    ):
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f"{name}: found {value!r}, expected a number from {low} to {high}")
    if softcap is not None and not (is_number(softcap) and softcap > 0):
        raise ValueError(f"softcap: found {softcap!r}, expected a positive number or None")
    if mode not in ("auto", "recompute", "reference"):
        raise ValueError(f"mode: found {mode!r}, expected 'auto', 'recompute' or 'reference'")
