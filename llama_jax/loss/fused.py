"""The head projection and its cross-entropy as one function that never holds the logits.

It works on chunks of tokens: a [chunk, vocab] block of logits is formed, turned into losses and, in the
same pass, into gradients, and dropped (the idea of Liger Kernel, arXiv:2410.10989, and of Cut
Cross-Entropy, arXiv:2411.09009).

T tokens, H hidden, V vocabulary, C tokens per chunk; one unit is one matmul of 2 * T * H * V FLOPs.
Operands of matmuls have the input dtype and accumulate in float32; softmax and losses are float32. All
of it is float64 for float64 inputs.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from llama_jax.loss.arguments import check_arrays, check_labels, check_options, find_vocab_axis
from llama_jax.loss.chunk_size import chunk_size
from llama_jax.loss.operands import Head, Tokens
from llama_jax.loss.options import IGNORE_INDEX, Mode, Options, Reduction
from llama_jax.loss.reduction import Reduced
from llama_jax.loss.reference import reference_losses
from llama_jax.loss.shards import find_shards
from llama_jax.loss.vjp import fused_losses
from llama_jax.numerics.scalars import plain_number


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """Losses of `fused_linear_cross_entropy`: scalars or, with reduction="none", one per token.

    Attributes:
        loss: ce_loss + z_loss, the one to differentiate.
        ce_loss: the cross-entropy, without gradient.
        z_loss: the z-loss, without gradient.
        num_tokens: how many labels are not ignored.

    >>> out = fused_linear_cross_entropy(
    ...     jnp.ones((3, 4)), jnp.zeros((4, 8)), jnp.array([0, 7, -100]), reduction="none", z_loss=0.1
    ... )
    >>> out.loss.shape, int(out.num_tokens)
    ((3,), 2)
    >>> jnp.allclose(out.loss, out.ce_loss + out.z_loss).item()
    True
    """

    loss: Float[Array, "*tokens"]
    ce_loss: Float[Array, "*tokens"]
    z_loss: Float[Array, "*tokens"]
    num_tokens: Int[Array, ""]


def fused_linear_cross_entropy(
    hidden: Float[Array, "*tokens hidden"],
    kernel: Float[Array, "rows columns"],
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
    loss_div_factor: Float[Array, ""] | float | None = None,
    chunk: int | None = None,
    mode: Mode = "auto",
    vocab_axis: Literal[0, 1] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    reduce_dtype: DTypeLike | None = None,
) -> LossOutput:
    """Cross-entropy of softcap(scale * (hidden @ kernel) + bias) against `labels`, plus z-loss.

    Args:
        hidden: [..., H] in float16, bfloat16, float32 or float64.
        kernel: [H, V], or [V, H] like a tied embedding; neither is transposed. If its dtype differs
            from that of `hidden`, matmuls are done in float32 (float64 if either is float64).
        labels: [...] integers, not shifted here. A label that is neither `ignore_index` nor in the
            vocabulary is an error outside jit and makes the loss NaN inside.
        bias: [V], added to the logits.
        scale: a scalar or [V], multiplies the projection before the bias.
        reduction: "sum" over tokens that are not ignored; "mean" divides that by their number (0 with
            zero gradients if there are none, where torch has NaN); "none" gives one loss per token, 0
            where ignored.
        z_loss: adds z_loss * logsumexp(logits)^2. Exactly off for None and 0.0.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        softcap: logits become softcap * tanh(logits / softcap).
        weights: [...], multiplies each token's losses. It does not change what "mean" divides by.
        loss_div_factor: divides all three losses after the reduction.
        chunk: tokens per chunk; None: `default_chunk` or fewer.
        mode: "auto"; "recompute" forms every gradient in the backward pass, from the logsumexp alone;
            "reference" is plain JAX that holds the logits and can be differentiated any number of
            times, in forward mode too.
        vocab_axis: which axis of `kernel` is the vocabulary; needed only if H = V.
        mesh: a mesh whose axes data, fsdp and sequence split the tokens and tensor the vocabulary;
            None uses the ambient one (`jax.set_mesh`). The first dimension of `labels` is split over
            data and fsdp, the second over sequence (the first over all three if it is the only one).
        reduce_dtype: in which the kernel's gradient is summed over these shards of the tokens, after each
            has accumulated its part in float32; None is float32 (float64 for float64).

    Cost, in matmuls of 2 T H V FLOPs for T tokens: 1 if no gradient is needed. "sum" and "mean" form
    gradients in the forward pass: 3, or 2 if only `hidden` (or only the kernel) needs one; residuals are
    float32 gradients, O(T H + V H). "none": 4 with a trainable kernel, residual O(T); 2 with a frozen one,
    residual O(T H). "recompute": 4. Under a mesh, each chunk of C tokens needs one pmax [C] and one psum
    [2..3, C] over the vocabulary; after the loop, one psum of the gradient of `hidden` over the vocabulary
    and one psum_scatter of the kernel's over the tokens: it comes out split as the parameter is, its hidden
    dimension over fsdp and sequence where they divide it.

    Raises:
        ValueError: when traced, for shapes, dtypes or options that are wrong; names the argument.

    >>> hidden = jax.random.normal(jax.random.key(0), (2, 5, 8))  # [batch, seq, hidden]
    >>> kernel = jax.random.normal(jax.random.key(1), (8, 50))  # [hidden, vocab]
    >>> labels = jnp.array([[3, 1, 4, 1, -100], [9, 2, 6, 5, -100]])
    >>> def loss(hidden, kernel):
    ...     return fused_linear_cross_entropy(hidden, kernel, labels).loss
    >>> value, (d_hidden, d_kernel) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    >>> value.shape, d_hidden.shape, d_kernel.shape
    ((), (2, 5, 8), (8, 50))
    """
    hidden, kernel = jnp.asarray(hidden), jnp.asarray(kernel)
    z_loss, label_smoothing, softcap = map(plain_number, (z_loss, label_smoothing, softcap))
    chunk, ignore_index, vocab_axis = map(plain_number, (chunk, ignore_index, vocab_axis))
    axis = find_vocab_axis(hidden, kernel, vocab_axis)
    vocab = kernel.shape[axis]
    check_options(
        reduction=reduction,
        mode=mode,
        chunk=chunk,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    check_arrays(hidden, kernel, labels, vocab, bias=bias, scale=scale, weights=weights)
    check_labels(labels, vocab, ignore_index)
    working_dtype = _working_dtype(hidden, kernel)
    shards = find_shards(mesh, hidden.shape)
    options = Options(
        per_token=reduction == "none",
        vocab_axis=axis,
        vocab=vocab,
        ignore_index=ignore_index,
        z_loss=float(z_loss or 0.0),
        label_smoothing=float(label_smoothing),
        softcap=None if softcap is None else float(softcap),
        chunk=chunk_size(
            chunk,
            labels.size // (shards.token_size if shards else 1),
            -(-vocab // (shards.vocab_size if shards else 1)),
        ),
        recompute=mode == "recompute",
        shards=shards,
        matmul_dtype=hidden.dtype if hidden.dtype == kernel.dtype else working_dtype,
        working_dtype=working_dtype,
        reduce_dtype=working_dtype if reduce_dtype is None else jnp.dtype(reduce_dtype),
    )
    head = Head(
        kernel=kernel,
        bias=None if bias is None else jnp.asarray(bias),
        scale=None if scale is None else jnp.asarray(scale).astype(working_dtype),
    )
    tokens = Tokens(
        hidden=hidden,
        labels=jnp.asarray(labels).astype(jnp.int32),
        weights=None if weights is None else jnp.asarray(weights).astype(working_dtype),
    )
    num_tokens = jnp.sum(tokens.labels != ignore_index, dtype=jnp.int32)
    divisor = jnp.maximum(num_tokens, 1).astype(working_dtype) if reduction == "mean" else None
    # In float16 a gradient divided by the number of tokens would underflow before the loss scale lifts
    # it, so there the division comes last and is part of the cotangent.
    divide_last = options.matmul_dtype == jnp.float16
    losses_of = reference_losses if mode == "reference" else fused_losses
    losses = losses_of(options, tokens, head, None if divide_last else divisor)
    if divisor is not None and divide_last:
        losses = _divide(losses, divisor)
    if loss_div_factor is not None:
        losses = _divide(losses, jnp.asarray(loss_div_factor).astype(working_dtype))
    ce, z = jax.lax.stop_gradient((losses.ce, losses.z))
    return LossOutput(loss=losses.total, ce_loss=ce, z_loss=z, num_tokens=num_tokens)


def shift_labels(labels: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Each position's next token: the first label dropped, IGNORE_INDEX appended, as in transformers.

    >>> shift_labels(jnp.array([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def _working_dtype(hidden: Array, kernel: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if jnp.float64 in (hidden.dtype, kernel.dtype) else jnp.float32)


def _divide(losses: Reduced, divisor: Float[Array, ""]) -> Reduced:
    return Reduced(*(loss / divisor for loss in losses))
