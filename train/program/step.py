"""The training step, a pure function of (params, opt_state, batch), and the evaluation step.

`params` is the tree of dicts that `nnx.to_pure_dict` makes of a model's parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llama_jax.loss import IGNORE_INDEX, Reduction, fused_linear_cross_entropy
from train.data.batch import Batch
from train.program.accumulation import Params, sum_over_micro_batches
from train.program.guard import Decision, decision_of
from train.program.optimizer import global_norm
from train.program.statistics import Observe


class DivergenceError(ValueError):
    """A loss, a gradient or a parameter that is not finite."""


class Metrics(NamedTuple):
    """Metrics of one step: cross-entropy and z-loss per token, the gradient's norm before clipping.

    guard: what the guard made of the step; None without one.
    """

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    num_tokens: Int[Array, ""]
    guard: Decision | None = None


def make_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    compute_dtype: Any,
    z_loss: float | None,
    reduce_dtype: Any = None,
    gather_once: bool = False,
    observe: Observe | None = None,
    **forward: Any,
) -> Callable[..., Any]:
    """`step(params, opt_state, batch, dropout_key) -> (params, opt_state, metrics)`.

    The forward and backward pass run in `compute_dtype`; parameters, gradients and updates have the dtype
    of `params`, except that gradients of micro-batches are summed in float32 (float64 for float64). The
    loss is the mean over the tokens of the complete batch, however micro-batches divide them. Jit the step
    with `params` and `opt_state` donated.

    Args:
        compute_dtype: not float16: without loss scaling, small gradients become 0 in it.
        reduce_dtype: see `LlamaModel.__call__`.
        gather_once: see `MeshOptions.fsdp_gather`.
        observe: the step also returns, after the metrics, what this makes of the parameters, the gradients,
            the updated parameters and the batch.
        forward: static arguments of `LlamaModel.__call__`: remat, unrolling, attention.
    """

    def loss(
        params: Params, batch: Batch, num_tokens: Array, key: Key[Array, ""] | None
    ) -> tuple[Array, tuple[Array, Array]]:
        out = batch_loss(
            graphdef, params, batch, compute_dtype, z_loss, key, reduce_dtype, **forward
        )
        # in the loss's dtype: bfloat16 cannot represent counts above 256 exactly
        count = num_tokens.astype(out.loss.dtype)
        return out.loss / count, (out.ce_loss / count, out.z_loss / count)

    def gradient(*operands: Any) -> tuple[tuple[Array, Array], Params]:
        (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(*operands)
        return losses, gradients

    def step(
        params: Params,
        opt_state: optax.OptState,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Any:
        valid = jnp.sum(batch.labels != IGNORE_INDEX, dtype=jnp.int32)
        (ce_loss, z), gradients = sum_over_micro_batches(
            gradient,
            params,
            batch,
            jnp.maximum(valid, 1),
            dropout_key,
            gather_once=gather_once,
            compute_dtype=compute_dtype,
            reduce_dtype=reduce_dtype,
        )
        metrics = Metrics(ce_loss, z, global_norm(gradients), valid)
        # optax mixes integers with floats, and updates of a wider state with parameters
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, opt_state, params, loss=ce_loss)
            updated = optax.apply_updates(params, updates)
        metrics = metrics._replace(guard=decision_of(opt_state))
        if observe is None:
            return updated, opt_state, metrics
        return updated, opt_state, metrics, observe(params, gradients, updated, batch)

    return step


def batch_loss(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    batch: Batch,
    compute_dtype: Any,
    z_loss: float | None,
    dropout_key: Key[Array, ""] | None,
    reduce_dtype: Any = None,
    reduction: Reduction = "sum",
    **forward: Any,
) -> Any:
    """The losses (a `LossOutput`), summed by default, of one micro-batch of arrays [rows, seq]."""
    cast = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
    model = nnx.merge(graphdef, cast)
    decoded = model.model(
        batch.input_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        dropout_key=dropout_key,
        token_order=batch.order,
        reduce_dtype=reduce_dtype,
        **forward,
    )
    return fused_linear_cross_entropy(
        decoded.last_hidden_state,
        model.head_weight,
        batch.labels,
        vocab_axis=0,
        reduction=reduction,
        z_loss=z_loss,
        reduce_dtype=reduce_dtype,
    )


def make_evaluation(
    graphdef: nnx.GraphDef[Any], *, compute_dtype: Any, **forward: Any
) -> Callable[[Params, Batch], tuple[Float[Array, ""], Int[Array, ""]]]:
    """`evaluate(params, batch)`: summed cross-entropy and number of tokens, one micro-batch at a time."""

    def evaluate(params: Params, batch: Batch) -> tuple[Array, Array]:
        def evaluate_micro_batch(part: Batch) -> tuple[Array, Array]:
            out = batch_loss(graphdef, params, part, compute_dtype, None, None, **forward)
            return out.ce_loss, out.num_tokens

        losses, counts = jax.lax.map(evaluate_micro_batch, batch)
        return jnp.sum(losses), jnp.sum(counts)

    return evaluate
