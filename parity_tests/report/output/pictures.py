"""Pictures of a report, as PNG files in memory."""

import io
from collections.abc import Iterator

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from parity_tests.reference.tolerances import ROUNDING_RATIO
from parity_tests.report.metrics import (
    Compared,
    allowed,
    first_to_drift,
    position_of_drift,
    windows,
)
from parity_tests.report.outputs import BINS
from parity_tests.report.run import Report

_OURS, _THEIRS = "#2a6fdb", "#d1672b"
_COLUMNS = 250  # of a heat map: positions beyond are pooled


def pictures(report: Report) -> Iterator[tuple[str, str, bytes]]:
    """(title, what it shows, PNG) of each."""
    yield (
        "Error by layer and position",
        f"Relative rms error of every layer's output in {report.ours}, and its ratio to that of "
        f"{report.theirs} (blue is smaller, red larger; white is equal).",
        _heat_maps(report),
    )
    yield (
        "Error through the modules",
        f"In forward order. The dotted line is the tolerance, {ROUNDING_RATIO} x {report.theirs}.",
        _through(report, report.modules, "module"),
    )
    yield (
        "Along the sequence",
        "Relative rms error of the logits, pooled over stretches of it, and divergence from the oracle.",
        _sequence(report),
    )
    yield ("Errors of the logits", "How many are how large.", _histogram(report))
    if report.parameters:
        yield (
            "Error through the gradients",
            f"In backward order, over the first {report.backward_length} tokens.",
            _through(report, report.parameters, "parameter"),
        )


def _heat_maps(report: Report) -> bytes:
    layers = [
        each
        for each in report.modules
        if each.name.startswith("layers.") and each.name.count(".") == 1
    ]
    ours, theirs = (
        np.stack([_shortened(getattr(each, side).by_position) for each in layers])
        for side in ("ours", "theirs")
    )
    floor = np.finfo(np.float32).tiny
    figure = Figure(figsize=(11, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    extent = (0, report.length, len(layers) - 0.5, -0.5)
    seen = np.maximum(np.nan_to_num(ours, nan=1.0, posinf=1.0), floor)
    norm = LogNorm(np.percentile(seen, 1), max(np.percentile(seen, 99), np.percentile(seen, 1) * 2))
    image = top.imshow(seen, aspect="auto", norm=norm, extent=extent, cmap="viridis")
    figure.colorbar(image, ax=top, label=f"error of {_short(report.ours)}")
    ratio = np.log2(np.maximum(seen, floor) / np.maximum(theirs, floor))
    image = bottom.imshow(ratio, aspect="auto", vmin=-1, vmax=1, extent=extent, cmap="RdBu_r")
    bar = figure.colorbar(image, ax=bottom, label="ratio", ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["0.5", "1", "2"])
    for axes in (top, bottom):
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("position")
    return _png(figure)


def _through(report: Report, compared: list[Compared], label: str) -> bytes:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="relative rms error", yscale="log")
    for name, values, color, style in (
        (report.theirs, [each.theirs.rms for each in compared], _THEIRS, "-"),
        (report.ours, [each.ours.rms for each in compared], _OURS, "-"),
        ("allowed", [allowed(each.theirs.rms, each.unit) for each in compared], "gray", ":"),
    ):
        shown = [value if value > 0 else np.nan for value in values]  # none is no point
        axes.plot(shown, style, color=color, linewidth=1, label=_short(name))
    drifted = first_to_drift(compared)
    if drifted is not None:
        place = [each.name for each in compared].index(drifted)
        error = compared[place].ours.rms
        axes.plot(place, error, "o", color="red", label=f"first to drift: {drifted}")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _sequence(report: Report) -> bytes:
    logits = report.outputs.logits
    starts, ours, theirs = zip(*windows(logits), strict=True)
    figure = Figure(figsize=(11, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, values, color in ((report.theirs, theirs, _THEIRS), (report.ours, ours, _OURS)):
        top.step(starts, values, where="post", color=color, label=_short(name))
    bound = [allowed(error, report.unit) for error in theirs]
    top.step(starts, bound, ":", where="post", color="gray", label="allowed")
    position = position_of_drift(logits)
    if position is not None:
        top.axvline(position, color="red", linewidth=1, label=f"drift begins at {position}")
    top.set(ylabel="error of logits", yscale="log")
    for said, color in ((report.outputs.theirs, _THEIRS), (report.outputs.ours, _OURS)):
        bottom.plot(np.maximum(said.kl, 1e-18), ".", color=color, markersize=2)
    bottom.set(ylabel="KL to the oracle", yscale="log", xlabel="position")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend()
    return _png(figure)


def _histogram(report: Report) -> bytes:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="|error| / rms of the row, log10", ylabel="logits")
    said, used = report.outputs, np.zeros(len(BINS) - 1, bool)
    for name, each, color in (
        (report.theirs, said.theirs, _THEIRS),
        (report.ours, said.ours, _OURS),
    ):
        axes.stairs(each.histogram, BINS, color=color, fill=True, alpha=0.4, label=_short(name))
        used |= each.histogram > 0
    if used.any():
        places = np.flatnonzero(used)
        axes.set_xlim(BINS[places[0]], BINS[places[-1] + 1])
    axes.legend()
    return _png(figure)


def _shortened(errors: np.ndarray) -> np.ndarray:
    """Positions pooled to at most `_COLUMNS`."""
    parts = np.array_split(errors, min(len(errors), _COLUMNS))
    return np.array([np.sqrt(np.mean(np.square(part, dtype=np.float64))) for part in parts])


def _short(name: str) -> str:
    return name if len(name) < 30 else f"...{name[-27:]}"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.set_canvas(FigureCanvasAgg(figure))
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
