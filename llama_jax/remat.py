"""What a layer keeps for its backward pass, and what it computes again (arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Remat = Literal["none", "dots", "full"]

# Names are given where the values are rounded: policies that look for products would keep their float32
# sums, twice the size of what is wanted in bfloat16.
KEPT_BY_DOTS = ("projection", "attention")


def rematerialised(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`function`, the body of a scan, with its residuals chosen.

    "none" keeps everything; "dots" keeps the outputs of the products (projections, attention) and computes
    again what is cheap (norms, activations, rotations); "full" keeps the inputs alone, and costs a
    second forward pass.

    Raises:
        ValueError: another name.
    """
    if remat not in get_args(Remat):
        raise ValueError(f"remat: found {remat!r}, expected one of {', '.join(get_args(Remat))}")
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = (
        policies.nothing_saveable
        if remat == "full"
        else policies.save_only_these_names(*KEPT_BY_DOTS)
    )
    # the loop keeps the two computations apart already
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
