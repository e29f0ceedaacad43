"""Floating-point operations of any traced program, counted."""

import math
from typing import Any


def product_flops(jaxpr: Any, kernel_share: float = 1.0) -> float:
    """Flops of every matrix product in a jaxpr, on all devices together; the dearest branch of a cond.

    Scans and the grids of Pallas kernels are multiplied out, what is within a `shard_map` by its devices.
    A `while` whose trip count nobody knows counts once.

    Args:
        kernel_share: the part of a kernel's grid that does something, where the rest is skipped.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name == "cond":
            total += max(
                product_flops(branch.jaxpr, kernel_share) for branch in equation.params["branches"]
            )
        else:
            times = _times(equation, kernel_share)
            # the first is the program itself; others are rules of its derivatives
            inner = [
                getattr(value, "jaxpr", value)
                for value in equation.params.values()
                if hasattr(getattr(value, "jaxpr", value), "eqns")
            ]
            total += times * sum(product_flops(each, kernel_share) for each in inner[:1])
    return total


def _times(equation: Any, kernel_share: float) -> float:
    """How often an equation runs the program inside it."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * kernel_share
    return 1
