"""Count the floating-point operations of a traced program."""

import math
from typing import Any


def matmul_flops(jaxpr: Any, kernel_share: float = 1.0, slowest: float = 1.0) -> float:
    """FLOPs of all matmuls in a jaxpr, on all devices together.

    What runs repeatedly is multiplied: the body of a scan by its length, a Pallas kernel by its grid, a
    `shard_map` by its devices. Of a cond the most expensive branch counts. A `while`, whose trip count is
    unknown, counts once; a Pallas kernel that has one counts as its cost estimate says.

    Args:
        kernel_share: fraction of a kernel's grid that computes something; the rest is skipped.
        slowest: work of the device that the others wait for in a kernel, in units of the mean. The result
            is then what all would compute if they were as slow.
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
                matmul_flops(branch.jaxpr, kernel_share, slowest)
                for branch in equation.params["branches"]
            )
        elif (estimate := _estimate(equation)) is not None:
            total += estimate * slowest
        else:
            repeats = _repeats(equation, kernel_share * slowest)
            # the first is the program itself but for a while's condition, the others are rules for its
            # derivatives
            programs = [
                getattr(value, "jaxpr", value)
                for name, value in equation.params.items()
                if name != "cond_jaxpr" and hasattr(getattr(value, "jaxpr", value), "eqns")
            ]
            total += repeats * sum(
                matmul_flops(program, kernel_share, slowest) for program in programs[:1]
            )
    return total


def _estimate(equation: Any) -> float | None:
    """FLOPs of a Pallas kernel that loops over blocks itself."""
    if equation.primitive.name != "pallas_call":
        return None
    loops = any(inner.primitive.name == "while" for inner in equation.params["jaxpr"].eqns)
    estimate = equation.params["cost_estimate"]
    return estimate.flops if loops and estimate is not None else None


def _repeats(equation: Any, kernel_share: float) -> float:
    """How often an equation runs the program in it."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * kernel_share
    return 1
