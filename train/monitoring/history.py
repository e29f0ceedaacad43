"""events.jsonl: when a run began, was resumed, saved, exported, stopped or failed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from llama_jax.files.staging import replacing, write_text
from llama_jax.formatting import first_line
from train.monitoring.metrics_log import open_lines, read_lines, write_line

FILE = "events.jsonl"

# takes the event, the steps that are done and, optionally, a detail in words and more by name
AddEvent = Callable[..., None]


def read_events(run: Path) -> list[dict[str, Any]]:
    """The run's events: dictionaries with `event`, `step` (steps done), `time` (ISO 8601) and `detail`."""
    return read_lines(run / FILE)


@contextmanager
def open_history(run: Path) -> Iterator[AddEvent]:
    """A function that adds an event; in processes but the first it does nothing.

    An error that ends the block is an event as well.
    """
    if jax.process_index() != 0:
        yield lambda event, step, detail="", **more: None
        return
    last = 0
    with replacing(run / FILE) as staged:  # without a last line that a crash cut off
        write_text(staged, "".join(json.dumps(event) + "\n" for event in read_events(run)))
    with open_lines(run / FILE) as file:

        def add(event: str, step: int, detail: str = "", **more: Any) -> None:
            nonlocal last
            last = step
            time = datetime.now(UTC).isoformat(timespec="seconds")
            line = {"event": event, "step": step, "time": time, "detail": detail}
            write_line(file, line | more)

        try:
            yield add
        except Exception as error:
            with suppress(OSError):  # the disk may be full
                add("error", last, first_line(error))
            raise
