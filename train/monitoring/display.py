"""What a run shows: a progress bar on a terminal, an occasional line elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from llama_jax import formatting

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows steps and messages on a console; silent without one."""

    def __init__(self, console: Console | None, bar: tuple[Progress, TaskID] | None) -> None:
        self._console, self._bar = console, bar
        self._last_line = -float("inf")

    def step(self, metrics: dict[str, Any], steps: int) -> None:
        """The metrics of one step, as in metrics.jsonl."""
        if self._console is None:
            return
        text = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            text += f"  MFU {metrics['mfu']:.1%}"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=metrics["step"], text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or metrics["step"] == steps:
            self._last_line = now
            self._console.print(f"step {metrics['step']}/{steps}  {text}")

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if self._console is not None:
            self._console.print(text)


@contextmanager
def open_display(steps: int, done: int, *, silent: bool) -> Iterator[Display]:
    """The display of a run of `steps` steps, of which `done` are done."""
    if silent:
        yield Display(None, None)
        return
    console = formatting.console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        yield Display(console, None)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, completed=done, text="compiling")
        yield Display(console, (progress, task))
