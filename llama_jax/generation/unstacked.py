"""The layers of a model one by one, for decoding on a CPU.

XLA's CPU backend copies a layer's weights out of the stacked ones before it multiplies with them. With many
tokens that is nothing; with one, it doubles and more what is read. Arrays of their own are read in place.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax.numerics.backend import target_platform
from llama_jax.sharding import mesh_axes


def wants_unstacked(model: Any) -> bool:
    """Whether `model`'s parameters lie whole on one CPU."""
    leaf = jax.tree.leaves(model)[0]
    return target_platform() == "cpu" and not mesh_axes().sizes and len(leaf.devices()) == 1


def unstack_layers(model: Any) -> Any:
    """A causal model whose layers are a list, for `unstack_cache`; its weights are views, not copies."""
    structure, state = nnx.split(model.model.layers)
    copy = nnx.merge(*nnx.split(model))
    count = model.config.num_hidden_layers
    leaves, tree = jax.tree.flatten(state)
    views = [_views(leaf) for leaf in leaves]
    layers = (jax.tree.unflatten(tree, [view[layer] for view in views]) for layer in range(count))
    copy.model.layers = nnx.List([nnx.merge(structure, layer) for layer in layers])
    return copy


def _views(stacked: jax.Array) -> list[jax.Array]:
    # an array object of its own: numpy's view would stay with the caller's, and keep it from being donated
    (shard,) = stacked.addressable_shards
    # committed where the caller's is: a state that changes between calls would compile anew
    device = next(iter(stacked.devices())) if stacked.committed else None
    return [jax.device_put(part, device, may_alias=True) for part in np.asarray(shard.data)]
