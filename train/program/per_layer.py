"""An optimizer's update rule over stacked layers, each layer updated as a separate parameter.

A model's layers are stacked along a leading axis. A rule that depends on a complete parameter (its root
mean square, its rows and columns, its singular vectors) would otherwise treat all layers as one.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

Path = tuple[Any, ...]


def is_stacked(path: Path) -> bool:
    """Whether the parameter at `path` stacks all layers along its first axis."""
    return any(getattr(key, "key", None) == "layers" for key in path)


def per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `rule` to a tree with stacked layers as if each layer were a separate parameter.

    A `vmap` of the rule handles the stacks, the rule itself all other parameters. The state keeps the
    rule's structure: what belongs to a stack has a leading axis of layers, what belongs to no parameter (a
    count of steps) is shared.

    Args:
        rule: must update every parameter independently, since it is applied to parts of the tree.
    """

    def init(params: Any) -> Any:
        stacks, rest = (_part(params, params, stacked) for stacked in (True, False))
        return _join(jax.vmap(rule.init)(stacks), rule.init(rest))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        trees = updates, state, params
        stacks, rest = (
            [_part(tree, params, stacked) for tree in trees] for stacked in (True, False)
        )
        # state that belongs to no parameter has no axis of layers
        axes = map_by_parameter(lambda _, path: None if path is None else 0, stacks[1], params)
        over_layers = jax.vmap(rule.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        stack_updates, stack_state = over_layers(*stacks)
        rest_updates, rest_state = rule.update(*rest)
        return _join(stack_updates, rest_updates), _join(stack_state, rest_state)

    return optax.GradientTransformation(init, update)


def map_by_parameter(function: Callable[[Any, Path | None], Any], tree: Any, params: Any) -> Any:
    """`function(leaf, path of its parameter)` for every leaf of an optimizer's state.

    A leaf belongs to the parameter whose path is a suffix of its own; the path is None if there is none.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    parameter_paths = {path for path, _ in flat}
    lengths = sorted({len(path) for path in parameter_paths}, reverse=True)

    def visit(path: Path, leaf: Any) -> Any:
        suffixes = (path[-length:] for length in lengths)
        return function(leaf, next((s for s in suffixes if s in parameter_paths), None))

    return jax.tree_util.tree_map_with_path(visit, tree)


def _part(tree: Any, params: Any, stacked: bool) -> Any:
    """`tree` with only what belongs to stacked parameters, or only what belongs to the others."""

    def keep(leaf: Any, path: Path | None) -> Any:
        return leaf if path is None or is_stacked(path) == stacked else optax.MaskedNode()

    return map_by_parameter(keep, tree, params)


def _join(stacks: Any, rest: Any) -> Any:
    """Merge two parts of a tree; what both have belongs to no parameter."""
    return jax.tree.map(
        lambda one, other: one if _is_masked(other) else other, stacks, rest, is_leaf=_is_masked
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
