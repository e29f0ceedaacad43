"""Where and in which dtype an optimizer's state is kept between steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, Key

from llama_jax.numerics.matmul import working_dtype

HOST_MEMORY = "pinned_host"


class CastState(NamedTuple):
    """The state of a rule in another dtype, after `step` steps."""

    step: Int[Array, ""]
    inner: optax.OptState


def kept_in(dtype: Any, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule`, computed in float32 (float64 for float64), with its state in `dtype` between steps.

    Rounding to bfloat16 is stochastic: a moment whose change is less than half of its last bit would never
    change, and with beta2 0.999 most are. The random bits depend on the step and on the position in
    the array, not on the mesh.
    """

    def cast(tree: Any, target: Any, key: Key[Array, ""] | None = None) -> Any:
        def cast_leaf(index: int, leaf: Array) -> Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            if key is None or target != jnp.bfloat16:
                return leaf.astype(target)
            return round_stochastically(leaf, jax.random.fold_in(key, index))

        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, [cast_leaf(*pair) for pair in enumerate(leaves)])

    def init(params: Any) -> CastState:
        return CastState(jnp.zeros((), jnp.int32), cast(rule.init(params), dtype))

    def update(updates: Any, state: CastState, params: Any = None) -> tuple[Any, CastState]:
        working = working_dtype(jax.tree.leaves(updates)[0].dtype)
        inner = cast(state.inner, working)
        updates, inner = rule.update(cast(updates, working), inner, params)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        return updates, CastState(state.step + 1, cast(inner, dtype, key))

    return optax.GradientTransformation(init, update)


def round_stochastically(x: Float[Array, "..."], key: Key[Array, ""]) -> BFloat16[Array, "..."]:
    """x in bfloat16, up or down with the probabilities that make its expected value x.

    >>> third = jnp.full(3000, 1 + 2**-7 / 3)
    >>> rounded = round_stochastically(third, jax.random.key(0)).astype(jnp.float32)
    >>> sorted({*rounded.tolist()}), abs(rounded.mean() - third[0]).item() < 2e-4
    ([1.0, 1.0078125], True)
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # bfloat16 is the upper half of float32: carry into it as often as the lower half is large
    carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.shift_right_logical(carried, jnp.uint32(16)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def on_host(rule: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`rule` for a state that arrives in the host's memory; where it returns to is the caller's choice."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return rule.update(updates, on_device(state), params, **extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def on_device(tree: Any) -> Any:
    """The same arrays in the memory of their devices, under `jit`; nothing is copied that is there."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)


def require_host_memory(device: Any, option: str) -> None:
    """Raise ValueError if the device has no host memory that it can be given arrays in."""
    # the devices of a topology of GPUs name no memories
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kinds and HOST_MEMORY not in kinds:
        raise ValueError(
            f"{option}: {device.device_kind} can use {', '.join(kinds)} memory, but no {HOST_MEMORY}; "
            "leave it out"
        )
