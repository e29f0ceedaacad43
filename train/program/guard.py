"""A guard of the optimizer: steps that are outliers among the last ones are left out or clipped.

A value is an outlier if it is above mean + sigma * standard deviation of a window of the last steps, as in
OLMo 2 (arXiv:2501.00656), which leaves such steps out; ZClip (arXiv:2504.02507) clips them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Float, Int

from llama_jax.numerics.matmul import working_dtype
from train.options import GuardOptions
from train.program.optimizer import global_norm
from train.program.per_layer import is_stacked

Params = Any


class Decision(NamedTuple):
    """What the guard made of a step. The order of the values is that of `value_names`.

    bound: what each value must not exceed; the largest number of its dtype if there is no bound.
    outlier: 1 for a value above its bound.
    non_finite: steps in a row, this one included, that had a value which is not finite.
    """

    bound: Float[Array, " values"]
    outlier: Int[Array, " values"]
    non_finite: Int[Array, ""]


class GuardState(NamedTuple):
    """The values of the last steps, in a ring; how many there ever were; the optimizer's state."""

    window: Float[Array, "steps values"]
    seen: Int[Array, ""]
    decision: Decision
    inner: optax.OptState


def guarded(
    rule: optax.GradientTransformationExtraArgs, options: GuardOptions
) -> optax.GradientTransformationExtraArgs:
    """`rule`, with outliers left out or clipped; its update takes the step's `loss` as well.

    A step that is left out changes neither the parameters nor the state of `rule`, but for the step of the
    learning-rate schedule: a run's learning rates do not depend on which steps are left out. Outliers enter
    the window as the bound, so that one does not hide the next and a lasting change is accepted in time;
    steps that are not finite do not enter it.
    """
    clips = options.action in ("clip", "clip-layers")
    by_layer = options.action == "clip-layers"
    watches_updates = options.update_sigma is not None

    def init(params: Params) -> GuardState:
        dtype = working_dtype(jax.tree.leaves(params)[0].dtype)
        size = 1 + len(group_norms(params, by_layer)) + watches_updates
        none = jnp.full(size, jnp.finfo(dtype).max, dtype)
        decision = Decision(none, jnp.zeros(size, jnp.int32), jnp.zeros((), jnp.int32))
        window = jnp.zeros((options.window, size), dtype)
        return GuardState(window, jnp.zeros((), jnp.int32), decision, rule.init(params))

    def update(
        updates: Any, state: GuardState, params: Params = None, *, loss: Array, **extra: Any
    ) -> tuple[Any, GuardState]:
        dtype = state.window.dtype
        norms = group_norms(updates, by_layer)
        bound = _bounds(state, _sigmas(options, len(norms)))
        if clips:
            limit = bound[1 : 1 + len(norms)]
            updates = scale_groups(updates, jnp.where(norms > limit, limit / norms, 1), by_layer)
        updates, inner = rule.update(updates, state.inner, params, **extra)
        values = [loss[None], norms]
        if watches_updates:
            values.append(global_norm(updates)[None])
        value = jnp.concatenate([each.astype(dtype) for each in values])
        finite, outlier = jnp.all(jnp.isfinite(value)), value > bound
        skip = jnp.zeros((), bool) if clips else jnp.any(outlier & finite)
        if options.non_finite:
            skip = skip | ~finite
        entered = state.window.at[state.seen % options.window].set(jnp.minimum(value, bound))
        non_finite = jnp.where(finite, 0, state.decision.non_finite + 1)
        decision = Decision(bound, (outlier & finite).astype(jnp.int32), non_finite)
        return (
            # adding 0.0 would change -0.0 to 0.0
            jax.tree.map(lambda leaf: jnp.where(skip, jnp.full_like(leaf, -0.0), leaf), updates),
            GuardState(
                window=jnp.where(finite, entered, state.window),
                seen=state.seen + finite.astype(jnp.int32),
                decision=decision,
                inner=_chosen(skip, state.inner, inner),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def decision_of(opt_state: optax.OptState) -> Decision | None:
    """The decision on the last step; None without a guard."""
    return opt_state.decision if isinstance(opt_state, GuardState) else None


def value_names(params: Params, options: GuardOptions) -> list[str]:
    """What the guard of `params` watches, in words.

    >>> value_names({"norm": jnp.ones(2)}, GuardOptions(action="skip", update_sigma=6.0))
    ['loss', 'gradient norm', 'update norm']
    """
    names = ["loss"]
    if options.action == "clip-layers":
        names += [f"gradient norm of {name}" for name in group_names(params)]
    else:
        names.append("gradient norm")
    return names if options.update_sigma is None else [*names, "update norm"]


def _sigmas(options: GuardOptions, norms: int) -> np.ndarray:
    """How many standard deviations each value may be above the mean; infinite where it is not judged."""
    judged = options.action is not None
    # clipping a gradient does nothing about the loss
    loss = options.loss_sigma if options.action == "skip" else None
    sigmas = [loss, *[options.norm_sigma if judged else None] * norms]
    if options.update_sigma is not None:
        sigmas.append(options.update_sigma)
    return np.array([np.inf if sigma is None else sigma for sigma in sigmas])


def _bounds(state: GuardState, sigmas: np.ndarray) -> Array:
    """Mean + sigma * standard deviation of a full window; before it is full there is no bound."""
    # as differences from one of the values, so that equal values have exactly their mean
    differences = state.window - state.window[:1]
    mean = state.window[0] + jnp.mean(differences, axis=0)
    deviation = jnp.std(differences, axis=0, ddof=1)
    bound = mean + sigmas.astype(mean.dtype) * deviation
    exists = (state.seen >= state.window.shape[0]) & jnp.isfinite(bound)
    return jnp.where(exists, bound, jnp.finfo(mean.dtype).max)


def _chosen(skip: Array, before: Any, after: Any) -> Any:
    """The optimizer's state before the step if it is left out; the schedule goes on in any case."""

    def choose(old: Any, new: Any) -> Any:
        return new if _is_schedule(new) else jnp.where(skip, old, new)

    return jax.tree.map(choose, before, after, is_leaf=_is_schedule)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def group_norms(tree: Any, by_layer: bool) -> Array:
    """The norm of the tree [1]; or of each layer, followed by each parameter that is in none."""
    if not by_layer:
        return global_norm(tree)[None]
    stacks, rest = _groups(tree)
    return jnp.concatenate(
        [jax.vmap(global_norm)(stacks), *(global_norm(leaf)[None] for leaf in rest)]
    )


def scale_groups(tree: Any, factors: Array, by_layer: bool) -> Any:
    """The tree times the factors of `_norms`' groups; a factor of 1 leaves every bit."""
    layers = len(jax.tree.leaves(_groups(tree)[0])[0]) if by_layer else 0
    rest = iter(range(layers, len(factors)))

    def scale(path: Any, leaf: Array) -> Array:
        if not by_layer:
            factor = factors[0]
        elif is_stacked(path):
            factor = factors[:layers].reshape(-1, *[1] * (leaf.ndim - 1))
        else:
            factor = factors[next(rest)]
        return (leaf.astype(factor.dtype) * factor).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(scale, tree)


def _groups(tree: Any) -> tuple[list[Array], list[Array]]:
    """The stacked parameters, and the others."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    stacks = [leaf for path, leaf in flat if is_stacked(path)]
    return stacks, [leaf for path, leaf in flat if not is_stacked(path)]


def group_names(params: Params) -> list[str]:
    """What `group_norms` by layer has a norm of."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    layers = next((leaf.shape[0] for path, leaf in flat if is_stacked(path)), 0)
    rest = [keystr(path, simple=True, separator=".") for path, _ in flat if not is_stacked(path)]
    return [*(f"layer {number}" for number in range(layers)), *rest]
