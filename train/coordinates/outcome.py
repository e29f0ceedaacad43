"""The outcome of a coordinate check: a table of slopes, coordinates.json and coordinates.png."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table

from llama_jax.files.staging import replacing, write_text
from train.monitoring.metrics_log import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON = "coordinates.json"
PICTURE = "coordinates.png"
FLAT = 0.05
"""the magnitude of a slope up to which the check calls it flat"""


class Check(NamedTuple):
    """rms: of activations by name, [widths, steps + 1]."""

    parametrization: str
    widths: Sequence[int]
    rms: Mapping[str, Float[np.ndarray, "widths steps_and_1"]]


def slopes(
    widths: Sequence[int], rms: Float[np.ndarray, "widths steps_and_1"]
) -> Float[np.ndarray, " steps_and_1"]:
    """The slope of log rms over log width after each number of steps; NaN where an rms is not positive.

    >>> slopes([64, 128, 256], np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0]])).round(6).tolist()
    [0.0, 1.0]
    """
    x = np.log2(widths) - np.mean(np.log2(widths))
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log2(rms)
        slope = x @ (y - y.mean(axis=0)) / (x @ x)
    return np.where(np.isfinite(slope), slope, np.nan)


def slope_table(check: Check) -> Table:
    """The last rms at each width and its slope, a row for each kind of activation."""
    table = Table(title=f"{check.parametrization}: rms after {_steps(check)} steps, by width")
    table.add_column("activation")
    for width in check.widths:
        table.add_column(f"{width}", justify="right")
    table.add_column("slope", justify="right")
    for name, rms in check.rms.items():
        slope = f"{slopes(check.widths, rms)[-1]:+.3f}"
        table.add_row(name, *(f"{value:.4g}" for value in rms[:, -1]), slope)
    return table


def verdict(check: Check) -> str:
    """Which slope is the largest, and whether all are flat."""
    last = {name: slopes(check.widths, rms)[-1] for name, rms in check.rms.items()}
    finite = {name: slope for name, slope in last.items() if np.isfinite(slope)}
    if len(finite) < len(last):
        broken = next(name for name in last if name not in finite)
        return f"{check.parametrization}: not flat: {broken} are not finite, or 0"
    name = max(finite, key=lambda name: abs(finite[name]))
    flat = abs(finite[name]) <= FLAT
    return (
        f"{check.parametrization}: {'flat' if flat else 'not flat'}: the largest slope is "
        f"{finite[name]:+.3f}, of the {name}"
    )


def write_outcome(folder: Path, checks: Sequence[Check]) -> None:
    """Write coordinates.json and coordinates.png."""
    content = {
        "widths": list(checks[0].widths),
        "steps": _steps(checks[0]),
        "parametrizations": {
            check.parametrization: {
                name: {"rms": _plain(rms), "slope": _plain(slopes(check.widths, rms))}
                for name, rms in check.rms.items()
            }
            for check in checks
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / JSON) as staged:
        write_text(staged, json.dumps(content, indent=2) + "\n")
    with replacing(folder / PICTURE) as staged:
        write_png(_figure(checks), staged)


def _figure(checks: Sequence[Check]) -> "Figure":
    """A row for each parametrization; rms over width, a line for each number of steps."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(checks[0].rms)
    # of the layers, the last one
    layers = (len(names) - 3) // 2
    shown = [names[0], names[layers], names[2 * layers], *names[2 * layers + 1 :]]
    figure = Figure(figsize=(3.2 * len(shown), 3 * len(checks)), layout="constrained")
    grid: Any = figure.subplots(len(checks), len(shown), squeeze=False, sharey="col")
    colors = matplotlib.colormaps["viridis"]
    steps = _steps(checks[0])
    for row, check in zip(grid, checks, strict=True):
        row[0].set_ylabel(f"{check.parametrization}: rms")
        for plot, name in zip(row, shown, strict=True):
            for step in range(steps + 1):
                rms = check.rms[name][:, step]
                if np.isfinite(rms).all() and (rms > 0).all():
                    label = f"step {step}" if step in (0, steps) else None
                    color = colors(step / max(steps, 1))
                    plot.plot(check.widths, rms, marker=".", color=color, label=label)
            slope = slopes(check.widths, check.rms[name])[-1]
            plot.set_title(f"{name}\nslope {slope:+.3f}", fontsize=9)
            plot.set_xscale("log", base=2)
            plot.set_yscale("log", base=2)
            plot.grid(alpha=0.3)
    for plot in grid[0]:
        low, high = plot.get_ylim()
        if high < 4 * low:  # a flat line should look flat
            plot.set_ylim((low * high) ** 0.5 / 2, (low * high) ** 0.5 * 2)
    grid[0, 0].legend(fontsize=8)
    for plot in grid[-1]:
        plot.set_xlabel("width")
    return figure


def _steps(check: Check) -> int:
    return next(iter(check.rms.values())).shape[1] - 1


def _plain(values: Any) -> Any:
    """Numbers for JSON, which has no NaN."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return float(values) if np.isfinite(values) else None
