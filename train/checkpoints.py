"""A run's checkpoints: Orbax's, asynchronous, atomic, for any mesh, and verified when they are read."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import keystr

from llama_jax.checkpoints.fingerprint import fingerprint, fingerprint_on_host
from llama_jax.checkpoints.orbax import require_utf8
from llama_jax.files.staging import DISK_FULL
from llama_jax.formatting import first_line
from train.agreement import DamagedError, gathered, together
from train.program.donation import donatable
from train.program.optimizer_state import on_device
from train.program.step import DivergenceError

FOLDER = "checkpoints"
CHUNK_BYTES = 2**26
_FEW_VALUES = 2**25  # of which NumPy computes fingerprints sooner than XLA compiles that
ALL_DAMAGED = "all checkpoints are damaged"


class Restored(NamedTuple):
    """A checkpoint, saved after `step` steps."""

    step: int
    params: Any
    opt_state: Any


def open_manager(
    run: Path, *, keep_last: int, keep_every: int | None, read_only: bool = False
) -> ocp.CheckpointManager:
    """Orbax's manager of the run's checkpoints. Raises ValueError for a path that is not UTF-8."""
    require_utf8(run)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep_last,
        keep_period=keep_every,
        read_only=read_only,
        create=not read_only,
        enable_async_checkpointing=not read_only,
    )
    return ocp.CheckpointManager((run / FOLDER).absolute(), options=options)


def require_safe_path(run: Path) -> None:
    """Raise ValueError for a folder from which Orbax could not read what it saves there.

    Orbax finds its files with a glob of their full path, in which `[x]` does not match itself, and
    TensorStore takes a backslash for a slash.
    """
    require_utf8(run)
    path = os.path.abspath(run)
    if "\\" in path or not fnmatchcase(path, path):
        raise ValueError(
            f"{run}: Orbax cannot save under a path with brackets or a backslash, choose another --out"
        )


def save(
    manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any, facts: dict[str, Any]
) -> None:
    """Start saving in the background; the arrays may be donated once this returns.

    Args:
        facts: JSON to keep with the arrays: configuration, seed, position in the data.

    Raises:
        DivergenceError: numbers that are not finite.
        ValueError: this save, or an earlier one, failed (a full disk).
    """
    if not all_finite((params, opt_state)):
        raise DivergenceError(
            f"step {step}: found parameters or optimizer state that are not finite, expected finite "
            "numbers: try a lower --optimizer.learning-rate; earlier checkpoints are kept"
        )
    # by the two programs that a restart needs
    numbers = [*fingerprints(params), *fingerprints(opt_state)]
    facts = facts | {"step": step, "fingerprints": numbers}
    try:
        # later ones were skipped as damaged when the run was resumed; Orbax would keep them as the newest,
        # and save nothing before them
        for later in manager.all_steps():
            if later >= step:
                manager.delete(later)
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params, _in_chunks(params)),
                opt_state=ocp.args.StandardSave(opt_state, _in_chunks(opt_state)),
                facts=ocp.args.JsonSave(facts),
            ),
        )
    except Exception as error:
        raise _save_failed(error) from error


class DiskFullError(ValueError):
    """A checkpoint could not be saved for lack of space."""


def require_no_failed_save(manager: ocp.CheckpointManager) -> None:
    """Raise ValueError if a save in the background has failed; waits for none."""
    try:
        manager.check_for_errors()
    except Exception as error:
        raise _save_failed(error) from error


def remove_unfinished(run: Path) -> None:
    """Remove what a failed save left; none may be under way."""
    for leftover in (run / FOLDER).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _in_chunks(tree: Any) -> Any:
    """Store large stacks layer by layer, so that a converter need not hold all of one in memory."""
    return jax.tree.map(
        lambda leaf: ocp.SaveArgs(
            chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if leaf.ndim else ()
        ),
        tree,
    )


def wait(manager: ocp.CheckpointManager) -> None:
    """Wait until everything saved is on disk. Raises ValueError if that failed."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _save_failed(error) from error


def restore(
    manager: ocp.CheckpointManager,
    params: Any,
    opt_state: Any,
    step: int | None = None,
    *,
    model: dict[str, Any] | None = None,
) -> Restored | None:
    """The newest intact checkpoint, or that of `step`; None if there is none.

    Args:
        params, opt_state: abstract arrays with the shardings to restore to, of any mesh.
        model: the model's configuration, which the checkpoint must have been saved with.

    Several processes agree: a checkpoint that one of them cannot read is damaged for all.

    Raises:
        ValueError: no checkpoint of that step, none that is intact, or one of another model or with another
            optimizer's state.

    Warns:
        UserWarning: a checkpoint is damaged, and the previous one is used.
    """
    steps = sorted(_steps_of_all(manager), reverse=True)
    if not steps:
        return None
    if step is not None:
        if step not in steps:
            available = ", ".join(map(str, sorted(steps)))
            raise ValueError(f"step: found {step}, expected one of {available}")
        steps = [step]
    for candidate in steps:
        try:
            together(partial(_require_fit, manager, candidate, opt_state, model), IncompatibleError)
            return _read_step(manager, candidate, params, opt_state)
        except DamagedError as damage:
            warnings.warn(
                f"{manager.directory}: the checkpoint of step {candidate} is damaged ({damage}); falling "
                "back to the previous one",
                stacklevel=2,
            )
    raise ValueError(f"{manager.directory}: {ALL_DAMAGED}")


def restore_params(manager: ocp.CheckpointManager, params: Any, step: int) -> Any:
    """Only the parameters of the checkpoint of `step`; `params` as in `restore`.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    with _naming_damage(manager, step):
        restored = _read_arrays(manager, step, "params", params)
        actual = fingerprints(restored)
        # those of the parameters come first, see `save`
        if actual != facts_of(manager, step)["fingerprints"][: len(actual)]:
            raise ValueError("its parameters are not what was saved")
    return restored


@contextmanager
def _naming_damage(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Within, what cannot be read is damage, and becomes an error that names the checkpoint."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Orbax and TensorStore have many
        raise ValueError(
            f"{manager.directory}: the checkpoint of step {step} is damaged ({first_line(error)}); choose "
            "another with --step"
        ) from error


def restore_part(manager: ocp.CheckpointManager, params: Any, opt_state: Any, step: int) -> Any:
    """Of the optimizer state of `step` only some leaves, so that the others take no memory.

    Args:
        params: as in `restore`; they are not read.
        opt_state: as in `restore`, with `ocp.PLACEHOLDER`, which is returned as it is, for the others.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    with _naming_damage(manager, step):
        return _read_part(manager, params, opt_state, step)


def _read_part(manager: ocp.CheckpointManager, params: Any, opt_state: Any, step: int) -> Any:

    def arguments(leaf: Any) -> Any:
        if leaf is ocp.PLACEHOLDER:
            return ocp.RestoreArgs()
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    wanted = [leaf for leaf in jax.tree.leaves(opt_state) if leaf is not ocp.PLACEHOLDER]
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_concurrent_gigabytes(wanted))
    with ocp.Checkpointer(handler) as reader:
        path = Path(manager.directory) / str(step) / "opt_state"
        arrays = ocp.args.PyTreeRestore(opt_state, restore_args=jax.tree.map(arguments, opt_state))
        restored = reader.restore(path, args=arrays)
    leaves = jax.tree.leaves(restored)
    saved = facts_of(manager, step)["fingerprints"][len(jax.tree.leaves(params)) :]
    pairs = [
        (leaf, number)
        for leaf, number in zip(leaves, saved, strict=True)
        if leaf is not ocp.PLACEHOLDER
    ]
    if fingerprints([leaf for leaf, _ in pairs]) != [number for _, number in pairs]:
        raise ValueError("its optimizer state is not what was saved")
    return restored


def _steps_of_all(manager: ocp.CheckpointManager) -> set[int]:
    """The steps of which any process sees a checkpoint; another one may not see it yet."""
    own = ",".join(map(str, sorted(manager.all_steps())))
    listed = gathered(own)
    if any(steps != own for steps in listed):
        manager.reload()
    return {int(step) for steps in listed for step in steps.split(",") if step}


class IncompatibleError(ValueError):
    """Not damage: no checkpoint in this folder fits, so there is nothing to fall back to."""


def _require_fit(
    manager: ocp.CheckpointManager, step: int, opt_state: Any, model: dict[str, Any] | None
) -> None:
    if model is not None:
        _require_same_model(manager, step, model)
    _require_same_state(manager, step, opt_state)


def _require_same_model(manager: ocp.CheckpointManager, step: int, model: dict[str, Any]) -> None:
    saved = facts_of(manager, step)["model"]
    config = json.loads(json.dumps(model))  # as `saved` has been through JSON
    if saved != config:
        differences = [
            f"{name}: found {config.get(name)}, expected {saved.get(name)}"
            for name in sorted(saved.keys() | config.keys())
            if saved.get(name) != config.get(name)
        ]
        raise IncompatibleError(
            f"{manager.directory}: the checkpoint of step {step} is of another model than config.json: "
            + "; ".join(differences)
        )


def _require_same_state(manager: ocp.CheckpointManager, step: int, opt_state: Any) -> None:
    """Check that the saved optimizer state has the shapes of `opt_state`: another version's may differ."""
    path = Path(manager.directory) / str(step) / "opt_state"
    with closing(ocp.StandardCheckpointHandler()) as reader:
        tree = reader.metadata(path).tree
    saved_shapes = {leaf.name: tuple(leaf.shape) for leaf in jax.tree.leaves(tree)}
    flat, _ = jax.tree_util.tree_flatten_with_path(opt_state)
    shapes = {keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in flat}
    if saved_shapes and saved_shapes != shapes:
        raise IncompatibleError(
            f"{manager.directory}: the checkpoint of step {step} has the optimizer state of another "
            "version of this program: `python -m train export` its weights and begin a new run from them "
            "with --model.init-from"
        )


def all_finite(tree: Any) -> bool:
    """Whether no array of floating-point numbers has an infinity or a NaN."""
    return bool(_all_finite(jax.tree.leaves(tree)))


@jax.jit
def _all_finite(leaves: list[Any]) -> Any:
    numbers = [leaf for leaf in on_device(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers]))


def fingerprints(tree: Any) -> list[int]:
    """One number for each leaf, see `llama_jax.checkpoints.fingerprint`."""
    leaves = jax.tree.leaves(tree)
    if sum(leaf.size for leaf in leaves) <= _FEW_VALUES and all(map(_is_on_cpu, leaves)):
        return [fingerprint_on_host(np.asarray(leaf)) for leaf in leaves]
    return [int(number) for number in jax.device_get(_fingerprints(leaves))]


def _is_on_cpu(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return True
    devices = leaf.sharding.device_set
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in devices)


@jax.jit
def _fingerprints(leaves: list[Any]) -> list[Any]:
    return [_fingerprint(leaf) for leaf in on_device(leaves)]


# arrays that are alike share a trace
_fingerprint = jax.jit(fingerprint)


def _read_step(manager: ocp.CheckpointManager, step: int, params: Any, opt_state: Any) -> Restored:
    """The checkpoint. Raises DamagedError if its arrays are not those that its fingerprints are of."""
    state, actual = [], []
    for name, abstract in (("params", params), ("opt_state", opt_state)):
        part = together(partial(_read_arrays, manager, step, name, abstract))
        actual += fingerprints(part)
        state.append(donatable(part))

    def require_same() -> None:
        if actual != facts_of(manager, step)["fingerprints"]:
            raise ValueError("its arrays are not what was saved")

    together(require_same)
    return Restored(step, *state)


def _read_arrays(manager: ocp.CheckpointManager, step: int, name: str, abstract: Any) -> Any:
    """One item of a checkpoint, of which no more than about two arrays are on the host at any time.

    No process waits for another, which may fail. Orbax would let 96 GB be under way. One array must fit:
    cutting a shard out of the chunks of another mesh may take all of them.
    """
    gigabytes = _concurrent_gigabytes(jax.tree.leaves(abstract))
    with closing(ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes)) as reader:
        path = manager.directory / str(step) / name
        return reader.restore(path, args=ocp.args.StandardRestore(abstract))


def _concurrent_gigabytes(leaves: list[Any]) -> int:
    """About two arrays."""
    return 1 + 2 * max(leaf.size * leaf.dtype.itemsize for leaf in leaves) // 10**9


def facts_of(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The facts saved with the checkpoint of `step`."""
    with closing(ocp.JsonCheckpointHandler()) as reader:
        facts: dict[str, Any] = reader.restore(manager.directory / str(step) / "facts")
        return facts


def newest_facts(run: Path) -> dict[str, Any] | None:
    """The facts of the newest checkpoint whose facts can be read; None without one."""
    steps = sorted(
        (int(p.name) for p in (run / FOLDER).glob("*") if p.name.isdecimal()), reverse=True
    )
    for step in steps:
        with suppress(OSError, ValueError), closing(ocp.JsonCheckpointHandler()) as reader:
            facts = reader.restore(epath.Path(run / FOLDER / str(step) / "facts"))
            if isinstance(facts, dict):
                return facts
    return None


def _save_failed(error: Exception) -> ValueError:
    kind = DiskFullError if _is_disk_full(error) else ValueError
    return kind(f"a checkpoint could not be saved ({first_line(error)}); earlier ones are kept")


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether it, or what caused it, is for lack of space; TensorStore only says so in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(os.strerror(number) in str(error) for number in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
