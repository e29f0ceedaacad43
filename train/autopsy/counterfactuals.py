"""What would have happened otherwise: the step and those after it, replayed with one thing changed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.autopsy.adjustable import AdjustableState, adjustable
from train.autopsy.documents import Piece, without
from train.autopsy.replay import Replay, State, batch_windows, placed, rates_of, step_key
from train.program.build import Program, run_program


class Change(NamedTuple):
    """One thing that is different.

    name: in words.
    state: (steps done, state on the host) to begin from.
    pieces: of documents that are left out of the batch of the step in question.
    scales: pairs of a step and a factor of its update.
    limits: of the gradient's norm in the step in question, by group, see `group_names`.
    beta2: from the first step on.
    """

    name: str
    state: tuple[int, State]
    pieces: Sequence[Piece] = ()
    scales: Sequence[tuple[int, float]] = ()
    limits: np.ndarray | None = None
    beta2: float | None = None


class Outcome(NamedTuple):
    """Losses and gradient norms of the step in question and of those after it; None if not finite."""

    name: str
    losses: list[float | None]
    grad_norms: list[float | None]


def outcomes(
    replay: Replay, step: int, horizon: int, changes: Sequence[Change], tell: Callable[[str], None]
) -> Iterator[Outcome]:
    """Replay every change to `horizon` steps after `step`.

    All use one program, which clips and scales by what its state says, so that they differ by the change
    alone; another beta2 takes a program of its own.
    """
    programs: dict[float | None, Program] = {}
    for change in changes:
        tell(change.name)
        if change.beta2 not in programs:
            programs[change.beta2] = _program(replay, change.beta2)
        yield _outcome(replay, programs[change.beta2], step, step + horizon, change)


def _program(replay: Replay, beta2: float | None) -> Program:
    options = replay.options
    if beta2 is not None:
        options = replace(options, optimizer=replace(options.optimizer, beta2=beta2))
    mesh = replay.program.mesh
    return run_program(
        replace(options, mesh=replace(options.mesh, **dict(mesh.shape))),
        replay.config,
        list(mesh.devices.flat),
        learning_rate=rates_of(replay.rates),
        wrap=adjustable,
    )


def _outcome(replay: Replay, program: Program, step: int, last: int, change: Change) -> Outcome:
    done, (params, inner) = change.state
    like = program.opt_state
    none = np.full(like.limits.shape, np.finfo(like.limits.dtype).max, like.limits.dtype)
    params, opt_state = jax.tree.map(
        lambda leaf, abstract: jax.device_put(np.asarray(leaf, abstract.dtype), abstract.sharding),
        (params, AdjustableState(jnp.asarray(none), jnp.ones((), like.scale.dtype), inner)),
        (program.params, like),
    )
    all_windows = batch_windows(replay, done)
    losses: list[float | None] = []
    norms: list[float | None] = []
    for number in range(done + 1, last + 1):
        windows = next(all_windows)
        limits, scale = none, dict(change.scales).get(number, 1.0)
        if number == step:
            windows = without(windows, change.pieces) if change.pieces else windows
            limits = limits if change.limits is None else change.limits
        opt_state = opt_state._replace(
            limits=jax.device_put(jnp.asarray(limits, like.limits.dtype), like.limits.sharding),
            scale=jax.device_put(jnp.asarray(scale, like.scale.dtype), like.scale.sharding),
        )
        params, opt_state, metrics = program.step(
            params, opt_state, placed(replay, windows), step_key(replay, number)
        )
        if number >= step:
            losses.append(_finite(metrics.loss))
            norms.append(_finite(metrics.grad_norm))
    all_windows.close()
    return Outcome(change.name, losses, norms)


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
