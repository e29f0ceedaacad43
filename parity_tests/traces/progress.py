"""A progress bar over the sections of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Start = Callable[[int], Callable[[], None]]


@contextmanager
def section_progress(console: Console) -> Iterator[Start]:
    """Yields a function of the number of sections; what it returns is called after each of them."""
    columns = BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:

        def start(sections: int) -> Callable[[], None]:
            return partial(progress.advance, progress.add_task("", total=sections))

        yield start
