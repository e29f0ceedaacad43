"""Checkpoints of a run, by Orbax: asynchronous, atomic, for any mesh, and checked when they are read."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

FOLDER = "checkpoints"

_PRIMES = (1299709, 40503, 7919, 104729, 611953)


class Restored(NamedTuple):
    """What a checkpoint holds; `step` steps are done."""

    step: int
    params: Any
    opt_state: Any


def open_manager(
    run: Path, *, keep_last: int, keep_every: int | None, read_only: bool = False
) -> ocp.CheckpointManager:
    """Orbax's manager of the run's checkpoints."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep_last,
        keep_period=keep_every,
        read_only=read_only,
        create=not read_only,
        enable_async_checkpointing=not read_only,
    )
    return ocp.CheckpointManager((run / FOLDER).absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any, facts: dict[str, Any]
) -> None:
    """Begin to save; the arrays may be donated when this returns.

    Args:
        facts: JSON to keep beside: configuration, seed, position in the data.

    Raises:
        ValueError: an earlier save failed (the disk is full), or this one does.
    """
    prints = [int(each) for each in fingerprints((params, opt_state))]
    kept = facts | {"step": step, "fingerprints": prints}
    try:
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                opt_state=ocp.args.StandardSave(opt_state),
                facts=ocp.args.JsonSave(kept),
            ),
        )
    except Exception as error:
        raise _save_failed(error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Return when everything saved is on disk. Raises ValueError where that failed."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _save_failed(error) from error


def restore(
    manager: ocp.CheckpointManager, params: Any, opt_state: Any, step: int | None = None
) -> Restored | None:
    """The newest checkpoint that is whole, or that of `step`; None where there is none.

    Args:
        params, opt_state: abstract arrays that say where everything goes, on whatever mesh.

    Raises:
        ValueError: no checkpoint of that step, or none that is whole.

    Warns:
        UserWarning: a damaged checkpoint is passed over for the one before.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        return None
    if step is not None:
        if step not in steps:
            shown = ", ".join(map(str, sorted(steps)))
            raise ValueError(f"step: found {step}, expected one of {shown}")
        steps = [step]
    for candidate in steps:
        try:
            return _restore_step(manager, candidate, params, opt_state)
        except Exception as error:  # Orbax and TensorStore raise whatever the damage leads them to
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            warnings.warn(
                f"{manager.directory}: the checkpoint of step {candidate} is damaged ({reason}); "
                "it is passed over",
                stacklevel=2,
            )
    raise ValueError(f"{manager.directory}: found no checkpoint that is whole, expected one")


def restore_params(manager: ocp.CheckpointManager, params: Any, step: int) -> Any:
    """The parameters alone of the checkpoint of `step`. `params` as in `restore`."""
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(params), facts=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=items)
    found = [int(each) for each in fingerprints(restored["params"])]
    # parameters come first, see `save`
    if found != restored["facts"]["fingerprints"][: len(found)]:
        raise ValueError(f"{manager.directory}: step {step}: parameters are not what was saved")
    return restored["params"]


def fingerprints(tree: Any) -> list[Any]:
    """One number a leaf: the sum of its bits as integers, which no sharding and no order changes."""
    return jax.device_get(_fingerprints(jax.tree.leaves(tree)))


@jax.jit
def _fingerprints(leaves: list[Any]) -> list[Any]:
    def sum_of_bits(leaf: Any) -> Any:
        width = leaf.dtype.itemsize * 8
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(width, 32)}"))
        # weighted by the place, so that two values that change places show
        places = jnp.uint32(1)
        for axis in range(bits.ndim):
            step = jnp.uint32(2 * _PRIMES[axis])
            places = places + step * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits.astype(jnp.uint32) * places, dtype=jnp.uint32)

    return [sum_of_bits(leaf) for leaf in leaves]


def _restore_step(
    manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any
) -> Restored:
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            facts=ocp.args.JsonRestore(),
        ),
    )
    expected = restored["facts"]["fingerprints"]
    found = [int(each) for each in fingerprints((restored["params"], restored["opt_state"]))]
    if found != expected:
        wrong = sum(one != other for one, other in zip(found, expected, strict=True))
        raise ValueError(f"{wrong} arrays are not what was saved")
    return Restored(step, restored["params"], restored["opt_state"])


def facts_of(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What `save` was given as facts."""
    restored = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))
    return restored["facts"]


def _save_failed(error: Exception) -> ValueError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ValueError(f"a checkpoint could not be saved ({reason}); earlier ones are kept")
