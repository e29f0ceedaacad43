"""The outcome of a sweep: a table, sweep.json and sweep.png."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from llama_jax.files.staging import replacing, write_text
from train.monitoring.metrics_log import write_png
from train.sweep.grid import Axis, Trial
from train.sweep.trials import Result, in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON = "sweep.json"
PICTURE = "sweep.png"


def groups(trials: Sequence[Trial]) -> dict[tuple[str, ...], list[int]]:
    """The trials that differ in the first axis only, by their values on the others."""
    grouped: dict[tuple[str, ...], list[int]] = {}
    for index, trial in enumerate(trials):
        grouped.setdefault(trial.values[1:], []).append(index)
    return grouped


def best_of(results: Sequence[Result], members: Sequence[int]) -> int | None:
    """The index with the least loss among those that ran the longest; None if all diverged."""
    finite = [index for index in members if _loss(results[index]) < math.inf]
    return min(
        finite, key=lambda index: (-results[index].step, _loss(results[index])), default=None
    )


def outcome_table(
    axes: Sequence[Axis], trials: Sequence[Trial], results: Sequence[Result]
) -> Table:
    """A row for each value of the first axis, a column for each combination of the others."""
    table = Table(title="loss; * is the best of its column")
    table.add_column(axes[0].name)
    columns = groups(trials)
    for values in columns:
        names = [f"{axis.label} {value}" for axis, value in zip(axes[1:], values, strict=True)]
        table.add_column("\n".join(names) or "loss", justify="right")
    best = {best_of(results, members) for members in columns.values()}
    for row, value in enumerate(axes[0].values):
        cells = []
        for members in columns.values():
            result = results[members[row]]
            last = max(results[index].step for index in members)
            text = in_words(result)
            if result.loss is not None and not result.diverged:
                text = f"{result.loss:.4f}"
                text += f" at step {result.step}" if result.step < last else ""
            cells.append(text + (" *" if members[row] in best else ""))
        table.add_row(value, *cells)
    return table


def write_outcome(
    folder: Path, axes: Sequence[Axis], trials: Sequence[Trial], results: Sequence[Result]
) -> None:
    """Write sweep.json and sweep.png."""
    best = [best_of(results, members) for members in groups(trials).values()]
    rows = [
        {
            "options": _named(axes, trial),
            "folder": str(trial.folder.relative_to(folder)),
            "step": result.step,
            "loss": result.loss if _loss(result) < math.inf else None,
            "diverged": result.diverged,
            "best": index in best,
        }
        for index, (trial, result) in enumerate(zip(trials, results, strict=True))
    ]
    content = {"first": axes[0].name, "trials": rows}
    with replacing(folder / JSON) as staged:
        write_text(staged, json.dumps(content, indent=2) + "\n")
    with replacing(folder / PICTURE) as staged:
        write_png(_figure(axes, trials, results), staged)


def _named(axes: Sequence[Axis], trial: Trial) -> dict[str, str]:
    return {axis.name: value for axis, value in zip(axes, trial.values, strict=True)}


def _figure(axes: Sequence[Axis], trials: Sequence[Trial], results: Sequence[Result]) -> "Figure":
    """Loss over the first axis, a line for each combination of the others, its best point marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    plot = figure.add_subplot(xlabel=axes[0].name, ylabel="loss (nats per token)")
    numbers = _numbers(axes[0].values)
    places: Any = range(len(axes[0].values)) if numbers is None else numbers
    if numbers is None:
        plot.set_xticks(list(places), axes[0].values)
    elif min(numbers) > 0 and max(numbers) >= 4 * min(numbers):
        plot.set_xscale("log", base=2 if max(numbers) >= 16 else 10)
    for color, (values, members) in enumerate(groups(trials).items()):
        points = [
            (places[row], results[index].loss)
            for row, index in enumerate(members)
            if _loss(results[index]) < math.inf
        ]
        if not points:
            continue
        label = ", ".join(f"{axis.label} {v}" for axis, v in zip(axes[1:], values, strict=True))
        points.sort()
        plot.plot(*zip(*points, strict=True), marker=".", color=f"C{color}", label=label)
        best = best_of(results, members)
        assert best is not None
        row = members.index(best)
        loss = _loss(results[best])
        plot.plot(places[row], loss, marker="o", markersize=9, color=f"C{color}")
    plot.grid(alpha=0.3)
    if len(axes) > 1 and plot.lines:
        plot.legend()
    return figure


def _numbers(texts: Sequence[str]) -> list[float] | None:
    """The texts as finite numbers; None if one is not."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _loss(result: Result) -> float:
    return math.inf if result.loss is None else result.loss
