"""The training step, a pure function of (params, opt_state, batch), and the evaluation step.

`params` is the tree of dicts that `nnx.to_pure_dict` makes of a model's parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from llama_jax.loss import IGNORE_INDEX, fused_linear_cross_entropy
from llama_jax.numerics.matmul import working_dtype
from llama_jax.numerics.reduction import as_sent
from llama_jax.sharding import SEQUENCE_AXIS, TENSOR_AXIS, mesh_axes
from train.data.batch import Batch
from train.program.optimizer import global_norm

Params = Any


class Metrics(NamedTuple):
    """Metrics of one step: cross-entropy and z-loss per token, the gradient's norm before clipping."""

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    num_tokens: Int[Array, ""]


def make_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    compute_dtype: Any,
    z_loss: float | None,
    reduce_dtype: Any = None,
    **forward: Any,
) -> Callable[..., tuple[Params, optax.OptState, Metrics]]:
    """`step(params, opt_state, batch, dropout_key) -> (params, opt_state, metrics)`.

    The forward and backward pass run in `compute_dtype`; parameters, gradients and updates have the dtype
    of `params`, except that gradients of micro-batches are summed in float32 (float64 for float64). The
    loss is the mean over the tokens of the complete batch, however micro-batches divide them. Jit the step
    with `params` and `opt_state` donated.

    Args:
        compute_dtype: not float16: without loss scaling, small gradients become 0 in it.
        reduce_dtype: see `LlamaModel.__call__`.
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

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(
        params: Params,
        opt_state: optax.OptState,
        batch: Batch,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Params, optax.OptState, Metrics]:
        valid = jnp.sum(batch.labels != IGNORE_INDEX, dtype=jnp.int32)
        count = jnp.maximum(valid, 1)
        micro_batches = batch.labels.shape[0]
        keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)

        def run(params: Params, part: Batch, key: Key[Array, ""] | None, count: Array) -> Any:
            (_, losses), gradients = gradient(params, part, count, key)
            return losses, gradients

        if micro_batches == 1:
            part, key = jax.tree.map(lambda x: x[0], (batch, keys))
            (ce_loss, z), gradients = run(params, part, key, count)
        else:
            sums = _summed(run, params, batch, keys, count, reduce_dtype)
            shapes = jax.eval_shape(run, params, *jax.tree.map(lambda x: x[0], (batch, keys)), count)
            (ce_loss, z), gradients = jax.tree.map(lambda a, x: a.astype(x.dtype), sums, shapes)
        metrics = Metrics(ce_loss, z, global_norm(gradients), valid)
        # optax mixes integers with floats, and updates of a wider state with parameters
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, metrics

    return step


def _summed(
    run: Callable[..., Any],
    params: Params,
    batch: Batch,
    keys: Key[Array, " micro"] | None,
    count: Array,
    reduce_dtype: Any,
) -> Any:
    """The sum of what `run` returns for each micro-batch, in float32 (float64 for float64).

    Replicas of the data axis add up their own gradients first, and sum them over the axis once: they hold
    as much either way. Over the axes that split parameters, gradients are summed for every micro-batch, or
    each device would hold them whole.
    """
    axes = mesh_axes()
    # XLA's partitioner crashes on a manual data axis beside sequence or tensor (jax 0.10.2); and dropout
    # draws its numbers by the row of the complete batch
    is_simple = keys is None and not axes.present(SEQUENCE_AXIS, TENSOR_AXIS)
    data = axes.present("data") if is_simple else ()

    def add_up(params: Params, batch: Batch, keys: Any, count: Array) -> Any:
        def add(sums: Any, part: Any) -> tuple[Any, None]:
            added = run(params, *part, count)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, added), None

        shapes = jax.eval_shape(run, params, *jax.tree.map(lambda x: x[0], (batch, keys)), count)
        # in a bfloat16 sum, terms below 1/512 of it would be lost
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, working_dtype(x.dtype)), shapes)
        sums, _ = jax.lax.scan(add, zeros, (batch, keys))
        if not data:
            return sums
        losses, gradients = sums
        gradients = jax.tree.map(lambda x: as_sent(x, reduce_dtype), gradients)
        return jax.lax.psum((losses, gradients), data)

    if not data:
        return add_up(params, batch, keys, count)
    return jax.shard_map(
        add_up,
        mesh=axes.mesh,
        in_specs=(P(), P(None, data), P(), P()),
        out_specs=P(),
        axis_names=set(data),
        check_vma=False,
    )(params, batch, keys, count)


def batch_loss(
    graphdef: nnx.GraphDef[Any],
    params: Params,
    batch: Batch,
    compute_dtype: Any,
    z_loss: float | None,
    dropout_key: Key[Array, ""] | None,
    reduce_dtype: Any = None,
    **forward: Any,
) -> Any:
    """The summed losses (a `LossOutput`) of one micro-batch of arrays [rows, seq]."""
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
        reduction="sum",
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
