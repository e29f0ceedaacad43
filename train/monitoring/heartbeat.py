"""heartbeat.json: what the run is doing, and when to expect the next sign of life, for supervisors.

{"phase": "training", "step": 120, "time": 1764240000.1, "expected_by": 1764240062.0, "pid": 4711,
"host": "a"}

phase        starting, training, evaluating, exporting, saving; at the end done, stopped or failed
step         steps that are done
time         when the file was written, in seconds since 1970
expected_by  the run hangs, or was killed, if it is later than this; null once the run has ended
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

FILE = "heartbeat.json"

_SECONDS_BETWEEN = 1.0
_LONGEST_PHASE = 1800.0  # of anything but training

# takes the phase and the steps that are done
Beat = Callable[[str, int], None]


@contextmanager
def open_heartbeat(run: Path) -> Iterator[Beat]:
    """A function that writes the run's heartbeat; in processes but the first it does nothing.

    While training it writes at most every second, and expects the next within a minute more than three
    times the longest interval so far. Compiling is part of the first interval.
    """
    if jax.process_index() != 0:
        yield lambda phase, step: None
        return
    written, before = ("", 0.0), time.monotonic()
    longest, last = 0.0, 0

    def beat(phase: str, step: int) -> None:
        nonlocal written, before, longest, last
        now, last = time.monotonic(), step
        if phase == written[0] == "training":
            longest = max(longest, now - before)
        before = now
        if phase == written[0] and now - written[1] < _SECONDS_BETWEEN:
            return
        written = phase, now
        limit = 60 + 3 * longest if phase == "training" else _LONGEST_PHASE
        _write(run, phase, step, None if phase in ("done", "stopped") else limit)

    try:
        yield beat
    except KeyboardInterrupt:  # by a signal, before the run could save anything
        _write(run, "stopped", last, None)
        raise
    except BaseException:
        _write(run, "failed", last, None)
        raise


def _write(run: Path, phase: str, step: int, limit: float | None) -> None:
    now = round(time.time(), 1)
    content = {
        "phase": phase,
        "step": step,
        "time": now,
        "expected_by": None if limit is None else round(now + limit, 1),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    # never half a file; not flushed to disk, as it is worth nothing after a crash of the machine
    staged = run / f".{FILE}.partial"
    with suppress(OSError):  # a full disk; the run has more to write that it cannot do without
        staged.write_text(json.dumps(content) + "\n")
        staged.replace(run / FILE)
