"""What a run shows: a live line on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama_jax import formatting

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Shows steps; silent in all processes but the first."""

    def __init__(self, console: Console, progress: Progress | None, task: Any, silent: bool):
        self.console, self._progress, self._task, self._silent = console, progress, task, silent
        self._last = -float("inf")

    def step(self, figures: dict[str, Any], steps: int) -> None:
        """The figures of one step, as they stand in metrics.jsonl."""
        if self._silent:
            return
        mfu = figures.get("mfu")
        shown = f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:,.0f} tokens/s" + (
            "" if mfu is None else f"  MFU {mfu:.1%}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=figures["step"], shown=shown)
            return
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or figures["step"] == steps:
            self._last = now
            self.console.print(f"step {figures['step']}/{steps}  {shown}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._silent:
            self.console.print(text)


@contextmanager
def display(steps: int, done: int, *, silent: bool) -> Iterator[Display]:
    """A `Display` of a run of `steps`, `done` of them done."""
    console = formatting.console(stderr=True, soft_wrap=True)
    if silent or not console.is_terminal:
        yield Display(console, None, None, silent)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps, completed=done, shown="compiling")
        yield Display(console, progress, task, silent)
