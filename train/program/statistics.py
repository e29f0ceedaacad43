"""Statistics of a training step: norms by layer and parameter, and what the activations are like.

A second compiled step returns them (`Program.statistics_step`); the ordinary one does not know of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import keystr
from jaxtyping import Array, Float

from llama_jax.numerics.matmul import working_dtype
from train.data.batch import Batch
from train.program.activation_statistics import ActivationStatistics, activation_statistics
from train.program.per_layer import is_stacked

Params = Any
# (params, gradients, updated params, batch) -> statistics of the step
Observe = Callable[[Params, Params, Params, Batch], "Statistics"]


class Norms(NamedTuple):
    """Euclidean norms of one parameter: [layers] if layers are stacked, else a scalar.

    gradient: before clipping. update: what the step added to the parameter. parameter: before the step.
    """

    gradient: Float[Array, "..."]
    update: Float[Array, "..."]
    parameter: Float[Array, "..."]


class Statistics(NamedTuple):
    """Norms by the parameter's name, such as model.layers.mlp.up_proj.weight, and of activations."""

    norms: dict[str, Norms]
    activations: ActivationStatistics


def make_observe(
    graphdef: nnx.GraphDef[Any], *, compute_dtype: Any, attention_implementation: str | None
) -> Observe:
    """The function with which `make_step` makes a step that returns statistics.

    The activations are those of another forward pass over the batch, with the parameters before the step
    and without dropout: so the gradients are computed as in a step without statistics, bit for bit.
    """

    def observe(params: Params, gradients: Params, updated: Params, batch: Batch) -> Statistics:
        # without it XLA could fuse this with the update, and round that differently
        params, gradients, updated = jax.lax.optimization_barrier((params, gradients, updated))
        return Statistics(
            parameter_norms(params, gradients, updated),
            activation_statistics(
                graphdef,
                params,
                batch,
                compute_dtype=compute_dtype,
                attention_implementation=attention_implementation,
            ),
        )

    return observe


def parameter_norms(params: Params, gradients: Params, updated: Params) -> dict[str, Norms]:
    """The norms of each parameter, in float32 (float64 for float64)."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    trees = zip(flat, jax.tree.leaves(gradients), jax.tree.leaves(updated), strict=True)
    norms = {}
    for (path, before), gradient, after in trees:
        axes = tuple(range(int(is_stacked(path)), before.ndim))
        change = _wide(after) - _wide(before)
        norms[keystr(path, simple=True, separator=".")] = Norms(
            *(
                jnp.sqrt(jnp.sum(jnp.square(_wide(x)), axis=axes))
                for x in (gradient, change, before)
            )
        )
    return norms


def _wide(x: Array) -> Array:
    return x.astype(working_dtype(x.dtype))
