"""Plots of errors, as PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from parity_tests.report.measure.metrics import pooled

OURS, THEIRS = "#2a6fdb", "#d1672b"
_COLUMNS = 250  # of a heat map: longer sequences are pooled to as many


def by_name(
    series: Mapping[str, Sequence[float]],
    bound: Sequence[float],
    label: str,
    marked: tuple[int, str] | None,
) -> bytes:
    """Errors of two programs, baseline first, along their modules, and what is allowed.

    `marked` is the index of a module, of the second program's error, and what to say of it.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="relative rms error", yscale="log")
    lines = [*zip(series, series.values(), (THEIRS, OURS), ("-", "-"), strict=True)]
    for name, values, color, style in (*lines, ("allowed", bound, "gray", ":")):
        positive = [value if value > 0 else np.nan for value in values]  # the axis is logarithmic
        axes.plot(positive, style, color=color, linewidth=1, label=short(name))
    if marked is not None:
        index, text = marked
        axes.plot(index, lines[-1][1][index], "o", color="red", label=text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def shortened(errors: np.ndarray) -> np.ndarray:
    """Errors by position, pooled to at most `_COLUMNS`."""
    parts = np.array_split(errors, min(len(errors), _COLUMNS))
    return np.array([pooled(part) for part in parts])


def short(name: str) -> str:
    """A name that fits into a legend."""
    return name if len(name) < 30 else f"...{name[-27:]}"


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    file = io.BytesIO()
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
