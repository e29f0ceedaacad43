"""Show a comparison of trajectories: as text, as JSON and as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from llama_jax.files.staging import replacing
from llama_jax.formatting import printable
from parity_tests.trajectory.compare import Curve, Trajectory

_OURS, _ROUNDING = "#2a6fdb", "#888888"


def verdict(trajectory: Trajectory) -> str:
    """One sentence: is it rounding, and if not, from where on."""
    departs = trajectory.departs
    if trajectory.same:
        return "the same at every common step"
    if departs is not None and not trajectory.has_rounding:
        return f"departs at step {departs.departs}: {departs.metric} is finite in one run alone"
    if not trajectory.has_rounding:
        return (
            "they differ; whether it is rounding cannot be told without two runs that differ in nothing "
            "else: --rounding C D"
        )
    if departs is None:
        curve = max(trajectory.curves, key=lambda curve: float(curve.ratios.max()))
        at = int(np.argmax(curve.ratios))
        return (
            f"rounding: the difference is at most {curve.ratios[at]:.3g} times that of the two roundings "
            f"({curve.metric}, step {curve.steps[at]}); {trajectory.factor:g} are allowed"
        )
    at = int(np.flatnonzero(departs.steps == departs.departs)[0])
    return (
        f"departs at step {departs.departs}: {departs.metric} differs by {departs.differences[at]:.1e}, "
        f"{departs.ratios[at]:.3g} times what rounding had done by then"
    )


def show(trajectory: Trajectory, out: Console) -> None:
    """A table of the metrics, the inputs that differ, and the verdict."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ["metric", "steps", "first", "largest", "last"]
    if trajectory.has_rounding:
        columns += ["rounding", "ratio", "departs"]
    for column in columns:
        table.add_column(column, justify="left" if column == "metric" else "right")
    for curve in trajectory.curves:
        differences = curve.differences
        cells = [
            curve.metric,
            f"{curve.steps[0]} to {curve.steps[-1]}",
            *(f"{value:.1e}" for value in (differences[0], differences.max(), differences[-1])),
        ]
        if trajectory.has_rounding:
            departs = "no" if curve.departs is None else f"step {curve.departs}"
            cells += [f"{curve.rounding[-1]:.1e}", f"{curve.ratios.max():.3g}", departs]
        table.add_row(*cells)
    out.print(
        "Relative difference of", printable(str(trajectory.a)), "and", printable(str(trajectory.b))
    )
    out.print(table)
    for given in trajectory.inputs:
        out.print(f"{given.metric} differs from step {given.step} on: {given.a:g} and {given.b:g}")
    out.print(verdict(trajectory), soft_wrap=True)


def to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Every number."""
    return {
        "a": str(trajectory.a),
        "b": str(trajectory.b),
        "verdict": verdict(trajectory),
        "departs": None if trajectory.departs is None else trajectory.departs.departs,
        "factor": trajectory.factor,
        "inputs": [given._asdict() for given in trajectory.inputs],
        "metrics": {curve.metric: _fields(curve) for curve in trajectory.curves},
    }


def _fields(curve: Curve) -> dict[str, Any]:
    return {
        "steps": curve.steps.tolist(),
        "differences": curve.differences.tolist(),
        "rounding": curve.rounding.tolist(),
        "departs": curve.departs,
    }


def write_picture(trajectory: Trajectory, path: Path) -> None:
    """PNG: a panel for each metric, with the difference and what rounding allows, over steps."""
    count = len(trajectory.curves)
    figure = Figure(figsize=(8, 1 + 3 * count), layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes, curve in zip(panels, trajectory.curves, strict=True):
        axes.set(xlabel="step", ylabel=f"relative difference of {curve.metric}", yscale="log")
        drawn = np.where(np.isfinite(curve.differences), curve.differences, np.nan)
        # 0 has no place on the axis
        axes.plot(curve.steps, np.maximum(drawn, curve.floor), color=_OURS, label="A and B")
        if trajectory.has_rounding:
            rounding = np.maximum(curve.rounding, curve.floor)
            axes.plot(curve.steps, rounding, color=_ROUNDING, label="two roundings, largest so far")
            top = trajectory.factor * rounding
            axes.fill_between(curve.steps, curve.floor, top, color=_ROUNDING, alpha=0.15)
        if curve.departs is not None:
            axes.axvline(curve.departs, color="#d1672b", linestyle=":", label="departs")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(verdict(trajectory), fontsize="small", wrap=True)
    with replacing(path) as staged:
        FigureCanvasAgg(figure).print_png(staged)
