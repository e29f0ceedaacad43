"""What a run shows of its compiled step: a profile of some steps, and the programs as text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llama_jax.files.remote import remote_path
from llama_jax.files.staging import write_text
from llama_jax.formatting import first_line

PROFILE = "profile"


class Diagnosis(NamedTuple):
    """profile: first and last step. hlo: directory for the programs as text."""

    profile: tuple[int, int] | None = None
    hlo: Path | None = None


NO_DIAGNOSIS = Diagnosis()


def require_possible(diagnosis: Diagnosis, steps: int) -> None:
    """Raise ValueError for steps that the run does not have, or a directory that cannot be one."""
    if diagnosis.profile is not None and diagnosis.profile[1] > steps:
        first, last = diagnosis.profile
        raise ValueError(
            f"--profile: found {first}:{last}, expected steps of the run, 1 to {steps}"
        )
    if (directory := diagnosis.hlo) is not None:
        if (remote := remote_path(directory)) is not None:
            raise ValueError(f"--dump-hlo: {remote} is remote, expected a local directory")
        directory.mkdir(parents=True, exist_ok=True)


@contextmanager
def profiling(
    diagnosis: Diagnosis,
    folder: Path,
    start: int,
    say: Callable[[str], None],
    flush: Callable[[], None],
) -> Iterator[Callable[[int], None]]:
    """A function to be called before each step, and once after the last: it begins and ends the profile.

    Args:
        start: steps that are done.
        flush: waits until the steps so far are computed.

    Raises:
        ValueError: the first step of the profile is done.
    """
    first, last = diagnosis.profile or (0, 0)
    if 0 < first <= start:
        raise ValueError(
            f"--profile: found {first}:{last}, expected steps from {start + 1} on: {start} are done"
        )
    running = False

    def before(step: int) -> None:
        nonlocal running
        if running and step > last:
            flush()
            running = False
            jax.profiler.stop_trace()
            say(f"profile of steps {first} to {last}: {folder / PROFILE} (open it with xprof)")
        elif step == first:
            flush()
            try:
                jax.profiler.start_trace(folder / PROFILE)
            except Exception as error:
                problem = (
                    f"the backend {jax.default_backend()} cannot make one ({first_line(error)})"
                )
                say(f"no profile: {problem}")
            else:
                running = True

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()


def write_programs(
    diagnosis: Diagnosis, step: jax.stages.Wrapped, arguments: Any, say: Callable[[str], None]
) -> None:
    """Write the step before and after XLA's optimization, if asked for; for that it is compiled twice."""
    if diagnosis.hlo is None:
        return
    lowered = step.lower(*arguments)
    _write(diagnosis.hlo / "step.stablehlo.mlir", lowered.as_text, say)
    _write(diagnosis.hlo / "step.optimized.hlo", lambda: lowered.compile().as_text(), say)


def _write(file: Path, text: Callable[[], str | None], say: Callable[[str], None]) -> None:
    try:
        content, problem = text(), "it has no text of its programs"
    except Exception as error:
        content, problem = None, first_line(error)
    if content is None:
        say(f"no {file}: the backend {jax.default_backend()} cannot ({problem})")
    elif jax.process_index() == 0:
        write_text(file, content)
        say(f"written: {file}")
