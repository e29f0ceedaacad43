"""An optimizer's rule over stacked layers, each of them updated as a parameter of its own.

A model's layers are stacked along a leading axis. A rule that looks at a whole parameter (its root mean
square, its rows and columns, its singular vectors) would take all layers for one.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

Path = tuple[Any, ...]


def is_stacked(path: Path) -> bool:
    """Whether the parameter at `path` holds all layers, one after the other along its first axis."""
    return any(getattr(key, "key", None) == "layers" for key in path)


def per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` over a tree with stacked layers, as if each layer's part were a parameter of its own.

    One `vmap` of the rule takes the stacks, the rule itself all other parameters. The state has the
    rule's own structure: what belongs to a stack has a leading axis of layers, what belongs to no
    parameter (a count of steps) is shared by all.

    Args:
        rule: must update each parameter by itself, so that it can be handed any part of a tree.
    """

    def init(params: Any) -> Any:
        stacks, rest = (_part(params, params, which) for which in (True, False))
        return _join(jax.vmap(rule.init)(stacks), rule.init(rest))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        trees = updates, state, params
        stacks, rest = ([_part(tree, params, which) for tree in trees] for which in (True, False))
        # what belongs to no parameter has no axis of layers
        axes = map_by_parameter(lambda _, path: None if path is None else 0, stacks[1], params)
        over_layers = jax.vmap(rule.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        moved, kept = over_layers(*stacks), rule.update(*rest)
        return _join(moved[0], kept[0]), _join(moved[1], kept[1])

    return optax.GradientTransformation(init, update)


def map_by_parameter(function: Callable[[Any, Path | None], Any], tree: Any, params: Any) -> Any:
    """`function(leaf, path of its parameter)` for every leaf of an optimizer's state.

    A leaf belongs to the parameter in whose path its own ends; the path is None where there is none.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    known = {path for path, _ in flat}
    lengths = sorted({len(path) for path in known}, reverse=True)

    def visit(path: Path, leaf: Any) -> Any:
        ends = (path[-length:] for length in lengths)
        return function(leaf, next((end for end in ends if end in known), None))

    return jax.tree_util.tree_map_with_path(visit, tree)


def _part(tree: Any, params: Any, stacked: bool) -> Any:
    """`tree` without what belongs to the other parameters: the stacked ones, or all but them."""

    def keep(leaf: Any, path: Path | None) -> Any:
        return leaf if path is None or is_stacked(path) == stacked else optax.MaskedNode()

    return map_by_parameter(keep, tree, params)


def _join(stacks: Any, rest: Any) -> Any:
    """Two parts as one tree; what is in both belongs to no parameter."""
    return jax.tree.map(
        lambda one, other: one if _is_masked(other) else other, stacks, rest, is_leaf=_is_masked
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
