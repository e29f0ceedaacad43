"""What a layer keeps for its backward pass, and what it computes again (arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any, get_args

import jax

from llama_jax.numerics.remat_policy import Remat

# Names are given where the values are rounded: policies that look for products would keep their float32
# sums, twice the size of what is wanted in bfloat16.
KEPT_BY_DOTS = ("projection", "attention")


def rematerialised(function: Callable[..., Any], remat: Remat, in_loop: bool) -> Callable[..., Any]:
    """`function`, a layer, with its residuals chosen.

    "none" keeps everything; "dots" keeps the outputs of the products (projections, attention) and computes
    again what is cheap (norms, activations, rotations); "full" keeps the inputs alone, and costs a
    second forward pass.

    Args:
        in_loop: a loop's forward and backward pass are apart anyway; elsewhere the compiler must be kept
            from finding that the same is computed twice.

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
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_loop)
