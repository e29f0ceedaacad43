"""The steps up to the one in question, replayed with their statistics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from train import checkpoints
from train.autopsy.documents import PieceLoss, piece_losses, pieces_of
from train.autopsy.moments import Moments, adam_moments
from train.autopsy.non_finite import Broken, broken_state
from train.autopsy.parts import part_name
from train.autopsy.replay import (
    DamagedError,
    Replay,
    State,
    batch_windows,
    placed,
    resumed_steps,
    state_at,
    step_key,
    to_host,
)
from train.data.batch import Batch
from train.data.windows import Window
from train.program.per_layer import is_stacked
from train.program.statistics import Statistics
from train.program.step import batch_loss

# a cause is looked for in this many steps: the one in question and those before it
RECENT = 8
# replayed steps by those with statistics, up to which all are run with statistics
_FEW = 4
# of a tree of arrays, by name and layer
Differences = dict[tuple[str, int | None], float]


class Step(NamedTuple):
    """What was seen of one step. pieces: of the documents in its batch, by the parameters before it."""

    step: int
    loss: float
    grad_norm: float
    statistics: Statistics
    pieces: list[PieceLoss]


class Changed(NamedTuple):
    """A checkpoint that does not hold what the steps before it lead to.

    differences: by parameter, or part of the optimizer state, and layer: the norm of the difference as a
        fraction of the larger of both.
    shrunk: the norm in the checkpoint as a fraction of that in the replay.
    resumed: whether the run was resumed from it.
    exact: whether the replay was the run, bit for bit, until then.
    replayed: the state that the steps lead to, if the checkpoint is recent.
    """

    step: int
    differences: Differences
    shrunk: Differences
    resumed: bool
    exact: bool
    replayed: State | None


class History(NamedTuple):
    """The replayed steps.

    start: where the replay began.
    steps: those with statistics; the last one is the step in question.
    windows: the batch of the last one.
    states: on the host, before the last step, and before the first of the recent ones; by steps done.
    moments: of states that were looked at, by steps done.
    unlike: the replayed steps whose loss or gradient norm is not the recorded one: (replayed, recorded).
    compared: how many were compared.
    broken: the first state that is not finite.
    """

    start: int
    steps: list[Step]
    windows: Window
    states: dict[int, State]
    moments: dict[int, dict[str, Moments]]
    changed: list[Changed]
    unlike: dict[int, tuple[float, float]]
    compared: int
    broken: Broken | None


def replay_history(
    replay: Replay, start: int, step: int, length: int, tell: Callable[[int], None]
) -> History:
    """Replay from the state after `start` steps up to `step`, which is run as well.

    Args:
        length: statistics are taken of that many steps before `step`.
        tell: called with every step that is done.

    Raises:
        ValueError: a checkpoint that is damaged.
    """
    program, options = replay.program, replay.options
    losses_of = jax.jit(_token_losses(replay))
    params, opt_state = state_at(replay, start)
    recent = max(start, step - RECENT)
    steps: list[Step] = []
    states: dict[int, State] = {}
    changed: list[Changed] = []
    moments = {start: adam_moments(opt_state, options.optimizer)}
    unlike: dict[int, tuple[float, float]] = {}
    compared = 0
    # compiling a second program takes longer than a few statistics
    only_statistics = step - start <= _FEW * (length + 1)
    windows: Window = {}
    broken = broken_state(start, (params, opt_state), saved=True)
    all_windows = batch_windows(replay, start)
    for done in range(start, step):
        windows = next(all_windows)
        if done > start and done in replay.saved:
            difference = _changed(replay, done, (params, opt_state), keep=done >= recent)
            if difference is not None:
                difference = difference._replace(exact=not unlike)
                del params, opt_state
                params, opt_state = state_at(replay, done)
                moments[done] = adam_moments(opt_state, options.optimizer)
                changed.append(difference)
                broken = broken or broken_state(done, (params, opt_state), saved=True)
        if done in (recent, step - 1):
            states[done] = to_host((params, opt_state))
        if done == step - 1 and done not in moments:
            moments[done] = adam_moments(opt_state, options.optimizer)
        batch, number = placed(replay, windows), done + 1
        if number >= step - length:
            token_losses = np.asarray(jax.device_get(losses_of(params, batch)))
            pieces = pieces_of(replay, number, windows)
            seen = piece_losses(pieces, windows, token_losses)
            params, opt_state, metrics, statistics = program.statistics_step(
                params, opt_state, batch, step_key(replay, number)
            )
            metrics = jax.device_get(metrics)
            loss, norm = float(metrics.loss), float(metrics.grad_norm)
            steps.append(Step(number, loss, norm, jax.device_get(statistics), seen))
        else:
            run = program.statistics_step if only_statistics else program.step
            params, opt_state, metrics, *_ = run(params, opt_state, batch, step_key(replay, number))
            loss = float(metrics.loss)
        broken = broken or broken_state(number, (params, opt_state), saved=False)
        line = replay.recorded.get(number)
        if line is not None and line["loss"] is not None:
            compared += 1
            if loss != line["loss"]:
                unlike[number] = loss, line["loss"]
        tell(number)
    all_windows.close()
    return History(start, steps, windows, states, moments, changed, unlike, compared, broken)


def _token_losses(replay: Replay) -> Callable[[Any, Batch], Float[Array, "rows seq"]]:
    """`(params, batch)` -> the loss of every token, in the order of the rows."""
    program, model = replay.program, replay.options.model
    compute_dtype = jnp.dtype(model.compute_dtype or model.parameter_dtype)
    order = program.batch.order

    def run(params: Any, batch: Batch) -> Array:
        def one(part: Batch) -> Array:
            return batch_loss(
                program.graphdef,
                params,
                part,
                compute_dtype,
                None,
                None,
                reduction="none",
                attention_implementation=model.attention,
            ).ce_loss

        losses = jax.lax.map(one, batch)
        losses = losses.reshape(-1, losses.shape[-1])
        if order is None:
            return losses
        return losses[:, np.argsort(order.slots(losses.shape[-1]))]

    return run


def _changed(replay: Replay, step: int, state: State, *, keep: bool) -> Changed | None:
    """How the checkpoint of `step` differs from the replayed state; None if it is the same, or damaged."""
    saved_prints = checkpoints.facts_of(replay.manager, step)["fingerprints"]
    if checkpoints.fingerprints(state) == saved_prints:
        return None
    try:
        saved = to_host(state_at(replay, step))
    except DamagedError:  # the run has not begun from it
        return None
    here = to_host(state)
    differences: Differences = {}
    shrunk: Differences = {}
    flat, _ = jax.tree_util.tree_flatten_with_path(here)
    for (path, ours), theirs in zip(flat, jax.tree.leaves(saved), strict=True):
        if not jnp.issubdtype(ours.dtype, jnp.floating):
            continue
        name = part_name(path)
        stacked = is_stacked(path) and ours.ndim > 0
        axes = tuple(range(int(stacked), ours.ndim))
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        norms = [np.sqrt(np.square(x).sum(axis=axes)) for x in (ours - theirs, ours, theirs)]
        apart, one, other = map(np.atleast_1d, norms)
        larger = np.maximum(np.maximum(one, other), 1e-300)
        for index in range(len(apart)):
            key = name, index if stacked else None
            differences[key] = float(apart[index] / larger[index])
            shrunk[key] = float(other[index] / max(one[index], 1e-300))
    resumed = step in resumed_steps(replay)
    return Changed(step, differences, shrunk, resumed, True, here if keep else None)
