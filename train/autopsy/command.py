"""`python -m train autopsy RUN STEP`."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llama_jax.files.staging import replacing, write_text
from llama_jax.formatting import console, printable
from llama_jax.numerics.xla_options import (
    leave_loops_rolled,
    reserve_gpu_memory,
    reserve_host_threads,
)
from train.autopsy.examine import examine
from train.autopsy.page import write_page
from train.autopsy.replay import Replay, open_replay
from train.autopsy.result import to_json
from train.autopsy.text import lines_of
from train.options import RunOptions


def run_autopsy(
    folder: Path,
    options: RunOptions,
    step: int,
    *,
    horizon: int,
    history: int,
    beta2: float | None,
    from_start: bool,
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Examine a step, print what was found and write the files.

    Raises:
        ValueError: a step that the run has not done, or that no checkpoint leads to; data that is gone or
            changed; as `examine`.
    """
    if step < 1:
        raise ValueError(f"step: found {step}, expected at least 1, the first step")
    if horizon < 0:
        raise ValueError(f"horizon: found {horizon}, expected at least 0")
    if history < 0:
        raise ValueError(f"history: found {history}, expected at least 0")
    if beta2 is not None and not 0 <= beta2 < 1:
        raise ValueError(f"beta2: found {beta2}, expected at least 0 and less than 1")
    say = console(stderr=True, soft_wrap=True)
    reserve_gpu_memory()
    reserve_host_threads()
    leave_loops_rolled()
    with ExitStack() as stack:
        replay = open_replay(folder, options, stack)
        require_done(replay, step)
        start = starting_step(replay, step, history, from_start=from_start)
        say.print(f"replaying {step - start} steps, from step {start} to step {step}")
        status = stack.enter_context(say.status("")) if say.is_terminal else None
        # a step that is not finite is examined as well
        stack.enter_context(np.errstate(all="ignore"))
        autopsy = examine(
            replay,
            step,
            start=start,
            length=history,
            horizon=min(horizon, replay.options.steps - step),
            beta2=beta2,
            tell=lambda text: None if status is None else status.update(printable(text)),
        )
        if json_file is not None:
            with replacing(json_file) as staged:
                write_text(staged, json.dumps(to_json(autopsy), indent=1) + "\n")
        if page is not None:
            write_page(autopsy, page)
    for line in lines_of(autopsy):
        print(line)
    for file in (json_file, page):
        if file is not None:
            say.print(f"written: {printable(str(file))}")


def require_done(replay: Replay, step: int) -> None:
    """Raise ValueError for a step after the one at which the run stopped or failed."""
    last = max([*replay.recorded, *replay.saved, 0])
    if step > replay.options.steps or step > last + 1:
        raise ValueError(
            f"step: found {step}, expected at most {last}, the last step that {replay.folder} has done"
        )


def starting_step(replay: Replay, step: int, history: int, *, from_start: bool) -> int:
    """Where to begin: at the newest checkpoint with `history` steps to go, if that is not too far back.

    Where none has as many to go it is the oldest that is not too far back: by more than `history` steps and
    those between two checkpoints. If all are, it is the nearest. The initial weights count as a checkpoint
    of step 0.

    Raises:
        ValueError: there is no checkpoint before the step.
    """
    if from_start:
        if replay.options.init_from is not None:
            raise ValueError(
                f"from-start: {replay.folder} did not begin with its first step, but with --init-from"
            )
        return 0
    near = history + replay.options.checkpoint.every
    candidates = [saved for saved in replay.saved if saved < step]
    if replay.options.init_from is None and step <= near:
        candidates.insert(0, 0)
    if not candidates:
        kept = ", ".join(map(str, replay.saved)) or "none"
        hint = (
            ""
            if replay.options.init_from is not None
            else f", or replay all {step} with --from-start"
        )
        raise ValueError(
            f"{replay.folder}: no checkpoint before step {step} is kept (found {kept}): choose a later step"
            f"{hint}; --checkpoint.keep-every keeps more"
        )
    within = [saved for saved in candidates if saved >= step - near] or [max(candidates)]
    return max([saved for saved in within if saved < step - history], default=min(within))
