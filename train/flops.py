"""Floating-point operations of any traced program, counted."""

import math
from typing import Any


def product_flops(jaxpr: Any) -> int:
    """Flops of every matrix product in a jaxpr, scans multiplied out; the dearest branch of a cond.

    A `while` whose trip count nobody knows counts once.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            # the first is the program itself; others are rules of its derivatives
            inner = [
                getattr(value, "jaxpr", value)
                for value in equation.params.values()
                if hasattr(getattr(value, "jaxpr", value), "eqns")
            ]
            total += times * sum(map(product_flops, inner[:1]))
    return total
