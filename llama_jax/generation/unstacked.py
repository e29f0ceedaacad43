"""A model with its layers as a list, for decoding on a CPU.

XLA's CPU backend copies a layer's weights out of the stacked array before it multiplies with them.
Negligible for many tokens; for a single one it more than doubles the memory traffic. Separate arrays are
read in place.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax.numerics.backend import target_platform
from llama_jax.sharding import mesh_axes


def can_unstack(model: Any) -> bool:
    """Whether all parameters of `model` are on a single CPU device."""
    leaf = jax.tree.leaves(model)[0]
    return target_platform() == "cpu" and not mesh_axes().sizes and len(leaf.devices()) == 1


def unstack_layers(model: Any) -> Any:
    """A causal model whose layers are a list, for `unstack_cache`; its weights are views of `model`'s."""
    structure, state = nnx.split(model.model.layers)
    copy = nnx.merge(*nnx.split(model))
    count = model.config.num_hidden_layers
    leaves, tree = jax.tree.flatten(state)
    views = [_views(leaf) for leaf in leaves]
    layers = (jax.tree.unflatten(tree, [view[layer] for view in views]) for layer in range(count))
    copy.model.layers = nnx.List([nnx.merge(structure, layer) for layer in layers])
    return copy


def _views(stacked: jax.Array) -> list[jax.Array]:
    # new JAX arrays: numpy views would reference the caller's arrays and keep them from being donated
    (shard,) = stacked.addressable_shards
    # committed if the caller's are: if that changed between calls, they would compile again
    device = next(iter(stacked.devices())) if stacked.committed else None
    return [jax.device_put(part, device, may_alias=True) for part in np.asarray(shard.data)]
