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
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax.loss.arguments import _validate_numbers, find_vocab_axis, validate
from llama_jax.loss.chunk import pad, product_dtype, run_chunk, shape_logits, working_dtype
from llama_jax.loss.options import (
    IGNORE_INDEX,
    Gradients,
    Losses,
    Mode,
    Options,
    Reduction,
    Wanted,
)
from llama_jax.loss.shards import find_shards, sum_over_shards
from llama_jax.numerics.backend import target_platform
from llama_jax.numerics.matmul import wide_einsum
from llama_jax.numerics.scalars import plain_number


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
    axis = find_vocab_axis(hidden, kernel, vocab_axis)
    vocab = kernel.shape[axis]
    validate(hidden, kernel, labels, vocab, bias, scale, weights, ignore_index, reduction, chunk)
    _validate_numbers(z_loss, label_smoothing, softcap, mode)
    labels = jnp.asarray(labels).astype(jnp.int32)
    working = working_dtype(hidden, kernel)
    bias = None if bias is None else jnp.asarray(bias)
    scale = None if scale is None else jnp.asarray(scale).astype(working)
    weights = None if weights is None else jnp.asarray(weights).astype(working)
    shards = find_shards(mesh, token_shape)
    vocab_shards = shards.vocab_size if shards else 1
    local_tokens = math.prod(token_shape) // (shards.token_size if shards else 1)
    options = Options(
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
    late = product_dtype(hidden, kernel) == jnp.float16
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(options: Options, hidden, kernel, bias, scale, weights, labels, count):
    losses, _ = _run(options, Wanted(), hidden, kernel, bias, scale, weights, labels, None)
    return _reduce(options, losses, weights, labels, count)


def _fused_forward(options: Options, *arguments):
    hidden, kernel, bias, scale, weights, labels, count = (
        None if argument is None else argument.value for argument in arguments
    )
    asked = [argument is not None and argument.perturbed for argument in arguments]
    wanted = Wanted(*asked[:4])
    # With a cotangent per token, gradients that sum over tokens must wait for it; a row of the
    # hidden states' gradient can be scaled when it comes.
    waits = options.per_token and (wanted.kernel or wanted.bias or wanted.scale)
    later = options.recompute or waits
    now = Wanted() if later else wanted
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

    wanted: Wanted
    weights: bool
    dtypes: tuple[Any, ...]


def _fused_backward(options: Options, residuals, cotangents):
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
        gradients = Gradients(*scaled)
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


def _reduce(options: Options, losses: Losses, weights: Array | None, labels, count: Array | None):
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
    options: Options, wanted: Wanted, hidden, kernel, bias, scale, weights, labels, logsumexp
) -> tuple[Any, Gradients]:
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
    padded_kernel = pad(kernel, options.vocab_axis, missing)
    padded_bias = None if bias is None else pad(bias, 0, missing)
    padded_scale = pad(scale, 0, missing) if per_column else scale
    losses_spec = None if logsumexp is not None else Losses(tokens, tokens, tokens)
    gradients_spec = Gradients(
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
    return losses, Gradients(
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
    options: Options, wanted: Wanted, hidden, kernel, bias, scale, weights, labels, logsumexp
) -> tuple[Any, Gradients]:
    """Losses and the wanted gradients of this shard's tokens and columns, a chunk at a time."""
    token_shape = labels.shape
    working = working_dtype(hidden, kernel)
    count = math.prod(token_shape)
    chunks = -(-count // options.chunk) if count else 1
    missing = chunks * options.chunk - count

    def split(values: Array | None, fill: Any) -> Array | None:
        if values is None:
            return None
        flat = pad(values.reshape(count, *values.shape[len(token_shape) :]), 0, missing, fill)
        return flat.reshape(chunks, options.chunk, *flat.shape[1:])

    xs = (
        split(hidden, 0),
        split(labels, options.ignore_index),
        split(weights, 0),
        split(logsumexp, 0),
    )
    body = partial(run_chunk, options, wanted, kernel, bias, scale, working)
    sums = Gradients(
        kernel=jnp.zeros(kernel.shape, working) if wanted.kernel else None,
        bias=jnp.zeros(bias.shape, working) if wanted.bias else None,
        scale=jnp.zeros(scale.shape, working) if wanted.scale else None,
    )
    sums, (losses, rows) = jax.lax.scan(body, sums, xs)

    def join(values: Array) -> Array:
        flat = values.reshape(chunks * options.chunk, *values.shape[2:])
        return flat[:count].reshape(*token_shape, *values.shape[2:])

    losses = None if losses is None else Losses(*map(join, losses))
    gradients = sums._replace(hidden=join(rows) if wanted.hidden else None)
    return losses, sum_over_shards(options.shards, gradients)


def _reference(options: Options, hidden, kernel, bias, scale, weights, labels, count):
    """The same numbers as plain JAX, holding the logits."""
    working, product = working_dtype(hidden, kernel), product_dtype(hidden, kernel)
    valid = labels != options.ignore_index
    x = jnp.where(valid[..., None], hidden, 0).astype(product)
    tokens = "abcdefg"[: x.ndim - 1]
    table = "vh" if options.vocab_axis == 0 else "hv"
    spec = f"{tokens}h,{table}->{tokens}v"
    raw = wide_einsum(spec, x, kernel.astype(product), working)
    logits, _ = shape_logits(options, raw, bias, scale)
    lse = jax.nn.logsumexp(logits, axis=-1)
    inside = (labels >= 0) & (labels < options.vocab)
    place = jnp.where(inside, labels, 0)[..., None]
    chosen = jnp.take_along_axis(logits, place, axis=-1)[..., 0]
    ce = lse - (1 - options.smoothing) * chosen
    if options.smoothing:
        ce = ce - options.smoothing * jnp.mean(logits, axis=-1)
    ce = jnp.where(valid, jnp.where(inside, ce, jnp.nan), 0)
    z = jnp.where(valid, options.z_loss * jnp.square(lse), 0)
    return _reduce(options, Losses(ce, z, lse), weights, labels, count)
