"""Rematerialization: what a layer keeps for its backward pass and what it recomputes (arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any, get_args

import jax

from llama_jax.numerics.remat_policy import Remat

# Values are named where they have been rounded: a policy that saves matmuls would save their float32 sums,
# twice the size of the bfloat16 result.
SAVED_BY_DOTS = ("projection", "attention")


def checkpointed(
    function: Callable[..., Any], remat: Remat, *, in_scan: bool
) -> Callable[..., Any]:
    """`function`, a layer, under `jax.checkpoint` with the policy of that name.

    "none" saves everything. "dots" saves the outputs of projections and attention, and recomputes what is
    cheap: norms, activations, rotations. "full" saves the inputs alone and costs a second forward pass.

    Args:
        in_scan: inside a scan XLA cannot merge the recomputation with the forward pass; elsewhere
            `prevent_cse` keeps it from doing so.

    Raises:
        ValueError: an unknown name.
    """
    if remat not in get_args(Remat):
        raise ValueError(f"remat: found {remat!r}, expected one of {', '.join(get_args(Remat))}")
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = (
        policies.nothing_saveable
        if remat == "full"
        else policies.save_only_these_names(*SAVED_BY_DOTS)
    )
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)
