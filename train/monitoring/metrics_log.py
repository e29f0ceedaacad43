"""metrics.jsonl: one line of metrics for every step and evaluation; and the picture of the loss."""

import errno
import json
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llama_jax.files.staging import replacing, write_text, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "metrics.jsonl"
PICTURE = "loss.png"

# metrics that differ between two runs of the same computation
TIMES = ("seconds", "tokens_per_second", "mfu", "data_wait")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's file; a last one that a crash cut off is left out."""
    return read_lines(run / FILE)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, none if there is no file; a last one that was cut off is left out.

    Raises:
        ValueError: a line that is not an object in JSON with a number `step`.
    """
    if not path.exists():
        return []
    lines = []
    # what follows the last newline is not a line
    for number, text in enumerate(path.read_text("utf-8").split("\n")[:-1], start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with a number `step`")
        lines.append(line)
    return lines


def open_metrics(run: Path, step: int) -> FileIO:
    """The file, open for appending, without the lines of steps after `step`: they will be run again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step]
    with replacing(run / FILE) as staged:
        write_text(staged, "".join(kept))
    return open_lines(run / FILE)


def open_lines(path: Path) -> FileIO:
    """A file for `write_line`, which appends to it."""
    return path.open("ab", buffering=0)


def write_line(file: FileIO, metrics: dict[str, Any]) -> None:
    """Append a line. If the disk is full nothing of it is left, so that it can be written again."""
    line = (json.dumps(metrics) + "\n").encode()
    size = os.fstat(file.fileno()).st_size
    with writing(Path(os.fsdecode(file.name))):
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):  # a device
                os.ftruncate(file.fileno(), size)
            raise


_BY_SOURCE = "validation_loss/"  # before the name of a source of a mixture


def draw_loss(run: Path) -> Path:
    """Draw training and validation loss over steps, of a mixture also by source; returns loss.png."""
    from matplotlib.figure import Figure

    lines = read_metrics(run)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    series: dict[str, tuple[str, dict[str, Any]]] = {
        "loss": ("training", {"linewidth": 1}),
        "validation_loss": ("validation", {"marker": "o"}),
    }
    for name in (name for line in lines for name in line if name.startswith(_BY_SOURCE)):
        label = f"validation, {name.removeprefix(_BY_SOURCE)}"
        series[name] = label, {"marker": ".", "linewidth": 1}
    for name, (label, style) in series.items():
        if points := values_of(lines, name):
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(run / PICTURE) as staged:
        write_png(figure, staged)
    return run / PICTURE


def values_of(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a metric of that name."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def write_png(figure: "Figure", target: Path | BinaryIO) -> None:
    """The figure as a PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(target, format="png", dpi=100)
