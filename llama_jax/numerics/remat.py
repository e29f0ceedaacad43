"""Rematerialization: what a layer keeps for its backward pass and what it recomputes (arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any, get_args

import jax

from llama_jax.numerics.remat_policy import Kept, KeptName, OffloadedName, Remat

# Values are named where they have been rounded: a policy that saves matmuls would save their float32 sums,
# twice the size of the bfloat16 result.
POLICIES: dict[Remat, Kept] = {"dots": Kept(saved=get_args(KeptName)), "full": Kept()}


def checkpointed(
    function: Callable[..., Any], remat: Remat | Kept, *, in_scan: bool
) -> Callable[..., Any]:
    """`function`, a layer, under `jax.checkpoint` with the policy of that name.

    "none" saves everything. "dots" saves the outputs of projections and attention, and recomputes what is
    cheap: norms, activations, rotations. "full" saves the inputs alone and costs a second forward pass.
    `Kept` saves the inputs and what it names.

    Args:
        in_scan: inside a scan XLA cannot merge the recomputation with the forward pass; elsewhere
            `prevent_cse` keeps it from doing so.

    Raises:
        ValueError: an unknown name, or one that is to be both saved and offloaded.
    """
    if isinstance(remat, str) and remat not in get_args(Remat):
        raise ValueError(f"remat: found {remat!r}, expected one of {', '.join(get_args(Remat))}")
    if remat == "none":
        return function
    kept = remat if isinstance(remat, Kept) else POLICIES[remat]
    require_names(kept)
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*kept.saved)
    if kept.offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(kept.saved),
            names_which_can_be_offloaded=list(kept.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


def require_names(kept: Kept) -> None:
    """Raise ValueError for a name that no value has, or that is in both lists."""
    for label, names, known in (
        ("saved", kept.saved, get_args(KeptName)),
        ("offloaded", kept.offloaded, get_args(OffloadedName)),
    ):
        for name in names:
            if name not in known:
                raise ValueError(
                    f"remat: found {label} {name!r}, expected some of {', '.join(known)}"
                )
    if both := [name for name in kept.offloaded if name in kept.saved]:
        raise ValueError(
            f"remat: found {both[0]} among both the saved and the offloaded, expected it once"
        )
