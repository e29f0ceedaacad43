"""Arrays that a step can overwrite."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from train.program.optimizer_state import on_device


def donatable(tree: Any) -> Any:
    """The same arrays in memory that XLA allocated itself; those of `tree` are deleted.

    What is placed on a device shard by shard, by Orbax or by `jax.make_array_from_callback`, may be memory
    that XLA does not own: numpy's, on a CPU. A step to which it is donated then copies it without a word
    (github.com/jax-ml/jax/issues/18617), and needs room for the state twice. Here there is one array at a
    time in memory twice, before the step needs room for anything else.

    >>> import numpy as np
    >>> placed = jax.device_put(np.arange(3.0))
    >>> donatable([placed]), placed.is_deleted()
    ([Array([0., 1., 2.], dtype=float32)], True)
    """
    return jax.tree.map(_copied, tree)


def _copied(array: jax.Array) -> jax.Array:
    if array.is_fully_addressable:  # without a program for each shape
        copy = jax.device_put(array, array.sharding, may_alias=False)
    else:
        copy = _copy_to(array.sharding)(array)
    copy.block_until_ready()
    array.delete()
    return copy


@cache
def _copy_to(sharding: jax.sharding.Sharding) -> Any:
    """One function for all arrays of a sharding, so that those that are alike share a compilation."""
    return jax.jit(_copy_of, out_shardings=sharding)


def _copy_of(array: jax.Array) -> jax.Array:
    return jnp.copy(on_device(array))
