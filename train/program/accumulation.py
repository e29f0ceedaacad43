"""Gradients of micro-batches: each device sums its own first, then they are summed over the devices.

By itself XLA sums over the devices after every micro-batch. Here a `shard_map` over the axes in question
runs all micro-batches (PyTorch's `no_sync`), so that what is sent does not grow with their number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Key

from llama_jax.numerics.matmul import working_dtype
from llama_jax.sharding import TENSOR_AXIS, mesh_axes
from train.data.batch import Batch

Params = Any
# (params, micro-batch of [rows, seq], the batch's number of tokens, dropout key) -> losses and gradients
Gradient = Callable[[Params, Batch, Array, Key[Array, ""] | None], tuple[Any, Params]]


def sum_over_micro_batches(
    gradient: Gradient,
    params: Params,
    batch: Batch,
    num_tokens: Int[Array, ""],
    dropout_key: Key[Array, ""] | None,
    *,
    gather_once: bool,
    compute_dtype: DTypeLike,
    reduce_dtype: DTypeLike | None,
) -> tuple[Any, Params]:
    """Losses and gradients, summed over micro-batches; the gradients in the dtypes of `params`.

    Args:
        batch: arrays [micro, rows, seq].
        gather_once: see `MeshOptions.fsdp_gather`.
        compute_dtype: in which weights that are gathered once are held.
        reduce_dtype: of sums over the axes of `axes_summed_once`; None is that of the sums over
            micro-batches, float32 (float64 for float64). In bfloat16, terms below 1/512 would be lost.
    """
    micro_batches = batch.labels.shape[0]
    keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    axes = axes_summed_once(micro_batches, gather_once, has_dropout=dropout_key is not None)
    if "fsdp" in axes:
        params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)

    def run(params: Params, batch: Batch, num_tokens: Array) -> tuple[Any, Params]:
        def run_one(index: Any) -> tuple[Any, Params]:
            part, key = jax.tree.map(lambda array: array[index], (batch, keys))
            return gradient(params, part, num_tokens, key)

        if micro_batches == 1:
            return run_one(0)

        def accumulate(sums: Any, index: Array) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, run_one(index)), None

        shapes = jax.eval_shape(run_one, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, working_dtype(x.dtype)), shapes)
        sums, _ = jax.lax.scan(accumulate, zeros, jnp.arange(micro_batches))
        return sums

    if axes:
        run = _summed_over(axes, run, reduce_dtype)
    losses, gradients = run(params, batch, num_tokens)
    return losses, jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), gradients, dtypes)


def axes_summed_once(
    micro_batches: int, gather_once: bool, *, has_dropout: bool
) -> tuple[str, ...]:
    """Axes of the ambient mesh over which gradients are summed once a step, not for each micro-batch.

    None with dropout: all replicas would draw the same numbers. Nor over data alone beside a tensor axis,
    where XLA's peak was 45 GiB instead of 25 for Llama 3.1 405B (docs/log.md).
    """
    axes = mesh_axes()
    if has_dropout:
        return ()
    if gather_once and axes.present("fsdp"):
        return axes.present("data", "fsdp")
    if micro_batches == 1 or axes.present(TENSOR_AXIS):
        return ()
    return axes.present("data")


def _summed_over(axes: tuple[str, ...], run: Callable[..., Any], dtype: DTypeLike | None) -> Any:
    """`run` on every part of a batch's rows; losses and gradients are summed over `axes`.

    They are summed outside of the `shard_map`, where XLA scatters the sums whose parameters are split; a
    `psum_scatter` within it would gather what other axes split.
    """

    def run_part(*operands: Any) -> Any:
        losses, gradients = run(*operands)
        if dtype is not None:
            gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), gradients)
        return jax.tree.map(lambda leaf: leaf[None], (losses, gradients))

    def run_all(*operands: Any) -> Any:
        parts = jax.shard_map(
            run_part,
            mesh=mesh_axes().mesh,
            in_specs=(P(), P(None, axes), P()),
            out_specs=P(axes),
            axis_names=set(axes),
            check_vma=False,
        )(*operands)
        # `jnp.sum` would add up bfloat16 in float32
        return jax.tree.map(
            lambda part: jax.lax.reduce(part, jnp.zeros((), part.dtype), jax.lax.add, (0,)), parts
        )

    return run_all
