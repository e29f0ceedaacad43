"""Plots of a report, as PNG."""

from collections.abc import Iterator

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from parity_tests.reference.tolerances import ROUNDING_RATIO
from parity_tests.report.measure.metrics import (
    Comparison,
    allowed,
    first_to_drift,
    position_of_drift,
    windows,
)
from parity_tests.report.measure.outputs import BINS
from parity_tests.report.output.plots import OURS, THEIRS, by_name, png, short, shortened
from parity_tests.report.run import Report


def pictures(report: Report) -> Iterator[tuple[str, str, bytes]]:
    """(title, caption, PNG) of each."""
    yield (
        "Error by layer and position",
        f"Relative rms error of every layer's output in {report.ours}, and its ratio to that of "
        f"{report.theirs} (blue is smaller, red larger; white is equal).",
        _heat_maps(report),
    )
    yield (
        "Error by module",
        f"In forward order. The dotted line is the tolerance, {ROUNDING_RATIO} x {report.theirs}.",
        _errors(report, report.modules, "module"),
    )
    yield (
        "Error by position",
        "Relative rms error of the logits, pooled over windows, and KL divergence from the oracle.",
        _sequence(report),
    )
    yield (
        "Distribution of the logits' errors",
        "Relative to the rms of the row.",
        _histogram(report),
    )
    if report.parameters:
        yield (
            "Error by gradient",
            f"In backward order, over the first {report.backward_length} tokens.",
            _errors(report, report.parameters, "parameter"),
        )


def _heat_maps(report: Report) -> bytes:
    outputs = [
        module
        for module in report.modules
        if module.name.startswith("layers.") and module.name.count(".") == 1
    ]
    ours = np.stack([shortened(layer.ours.by_position) for layer in outputs])
    theirs = np.stack([shortened(layer.theirs.by_position) for layer in outputs])
    floor = np.finfo(np.float32).tiny
    figure = Figure(figsize=(11, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    extent = (0, report.length, len(outputs) - 0.5, -0.5)
    finite = np.maximum(np.nan_to_num(ours, nan=1.0, posinf=1.0), floor)
    norm = LogNorm(
        np.percentile(finite, 1), max(np.percentile(finite, 99), np.percentile(finite, 1) * 2)
    )
    image = top.imshow(finite, aspect="auto", norm=norm, extent=extent, cmap="viridis")
    figure.colorbar(image, ax=top, label=f"error of {short(report.ours)}")
    ratio = np.log2(np.maximum(finite, floor) / np.maximum(theirs, floor))
    image = bottom.imshow(ratio, aspect="auto", vmin=-1, vmax=1, extent=extent, cmap="RdBu_r")
    bar = figure.colorbar(image, ax=bottom, label="ratio", ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["0.5", "1", "2"])
    for axes in (top, bottom):
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("position")
    return png(figure)


def _errors(report: Report, comparisons: list[Comparison], label: str) -> bytes:
    drifted = first_to_drift(comparisons)
    names = [comparison.name for comparison in comparisons]
    return by_name(
        {
            report.theirs: [c.theirs.rms for c in comparisons],
            report.ours: [c.ours.rms for c in comparisons],
        },
        [allowed(c.theirs.rms, c.eps) for c in comparisons],
        label,
        None if drifted is None else (names.index(drifted), f"first to drift: {drifted}"),
    )


def _sequence(report: Report) -> bytes:
    logits = report.outputs.logits
    starts, ours, theirs = zip(*windows(logits), strict=True)
    figure = Figure(figsize=(11, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, values, color in ((report.theirs, theirs, THEIRS), (report.ours, ours, OURS)):
        top.step(starts, values, where="post", color=color, label=short(name))
    bound = [allowed(error, report.eps) for error in theirs]
    top.step(starts, bound, ":", where="post", color="gray", label="allowed")
    position = position_of_drift(logits)
    if position is not None:
        top.axvline(position, color="red", linewidth=1, label=f"first to drift: {position}")
    top.set(ylabel="error of logits", yscale="log")
    for program, color in ((report.outputs.theirs, THEIRS), (report.outputs.ours, OURS)):
        bottom.plot(np.maximum(program.kl, 1e-18), ".", color=color, markersize=2)
    bottom.set(ylabel="KL divergence", yscale="log", xlabel="position")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend()
    return png(figure)


def _histogram(report: Report) -> bytes:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="|error| / rms of the row, log10", ylabel="logits")
    used = np.zeros(len(BINS) - 1, bool)
    for name, program, color in (
        (report.theirs, report.outputs.theirs, THEIRS),
        (report.ours, report.outputs.ours, OURS),
    ):
        axes.stairs(program.histogram, BINS, color=color, fill=True, alpha=0.4, label=short(name))
        used |= program.histogram > 0
    if used.any():
        first, last = np.flatnonzero(used)[[0, -1]]
        axes.set_xlim(BINS[first], BINS[last + 1])
    axes.legend()
    return png(figure)
