"""report.html: a run on one page, with the pictures of its statistics."""

import io
import json
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.files.staging import replacing, write_text
from llama_jax.html_page import Rows, document, figure, table
from train.monitoring.heat_maps import FOLDER, statistics_pictures
from train.monitoring.history import read_events
from train.monitoring.metrics_log import draw_loss, read_metrics, values_of, write_png
from train.options import FILE as OPTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"
_SERIES = {
    "tokens_per_second": "tokens per second",
    "grad_norm": "norm of the gradient",
    "learning_rate": "learning rate",
}
_EVENTS_SHOWN = 50  # the others can be unfolded


def write_report(run: Path, page: Path) -> None:
    """Write the page of a run, finished or not; to its folder, loss.png and pictures of its statistics.

    Args:
        run: its folder.
        page: the file to write.

    Raises:
        ValueError: a file of the run's that is not what it should be.
    """
    lines = read_metrics(run)
    pictures = [("Loss", "Training and validation loss.", draw_loss(run).read_bytes())]
    pictures.append(("Progress", "Of each step.", _png(_progress(lines))))
    for name, caption, heat_maps in statistics_pictures(lines):
        png = _png(heat_maps)
        (run / FOLDER).mkdir(exist_ok=True)
        with replacing(run / FOLDER / f"{name}.png") as staged:
            staged.write_bytes(png)
        title = name.replace("_", " ").capitalize()
        pictures.append((title, f"{caption} By layer, over steps.", png))
    body = [
        f"<h1>{escape(run.name)}</h1>",
        table(("", ""), _summary(lines)),
        *(figure(*picture) for picture in pictures),
        "<h2>Validation</h2>",
        _folded("All evaluations", ("step", "loss", "perplexity", "sample"), _evaluations(lines)),
        "<h2>Events</h2>",
        *_event_tables(run, lines),
        "<h2>Configuration</h2>",
        _folded("Options", ("option", "value"), _entries(_options(run))),
        _folded("Model", ("field", "value"), _entries(_model(run))),
    ]
    with replacing(page) as staged:
        write_text(staged, document(f"Run {run.name}", body))


def _summary(lines: list[dict[str, Any]]) -> Rows:
    rows = []
    if losses := values_of(lines, "loss"):
        rows += [("steps", f"{losses[-1][0]:,}"), ("training loss", f"{losses[-1][1]:.4f}")]
    if validation := values_of(lines, "validation_loss"):
        step, best = min(validation, key=lambda point: point[1])
        rows.append(("validation loss", f"{validation[-1][1]:.4f}"))
        rows.append(("lowest validation loss", f"{best:.4f} (step {step:,})"))
    if tokens := values_of(lines, "num_tokens"):
        rows.append(("tokens with a label", f"{sum(count for _, count in tokens):,}"))
    if speeds := sorted(speed for _, speed in values_of(lines, "tokens_per_second")):
        rows.append(("tokens per second (median)", f"{speeds[len(speeds) // 2]:,.0f}"))
    if shares := sorted(share for _, share in values_of(lines, "mfu")):
        rows.append(("MFU (median)", f"{shares[len(shares) // 2]:.1%}"))
    return rows or [("steps", "0")]


def _evaluations(lines: list[dict[str, Any]]) -> Rows:
    return [
        (
            str(line["step"]),
            f"{line['validation_loss']:.4f}",
            f"{line['perplexity']:.2f}" if "perplexity" in line else "",
            str(line.get("sample", "")),
        )
        for line in lines
        if line.get("validation_loss") is not None
    ]


def _event_tables(run: Path, lines: list[dict[str, Any]]) -> Iterator[str]:
    """What happened, oldest first; steps that were skipped or clipped are in metrics.jsonl."""
    columns = "time", "step", "event", ""
    history = [
        (event.get("time", ""), str(event["step"]), event["event"], event.get("detail", ""))
        for event in read_events(run)
    ]
    steps = [
        ("", str(line["step"]), str(line["event"]), "; ".join(map(str, line.get("reason", ()))))
        for line in lines
        if "event" in line
    ]
    for title, rows in (("Run", history), ("Steps", steps)):
        if len(rows) > _EVENTS_SHOWN:
            yield table(columns, rows[-_EVENTS_SHOWN:])
            yield _folded(f"{title}: all {len(rows)}", columns, rows)
        elif rows:
            yield table(columns, rows)
    if not history and not steps:
        yield "<p>None recorded.</p>"


def _folded(title: str, columns: tuple[str, ...], rows: Rows) -> str:
    return f"<details><summary>{escape(title)}</summary>{table(columns, rows)}</details>"


def _options(run: Path) -> dict[str, Any]:
    path = run / OPTIONS
    try:
        return tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def _model(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    try:
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def _entries(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            rows += _entries(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


def _progress(lines: list[dict[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for index, (name, label) in enumerate(_SERIES.items()):
        axes = figure.add_subplot(1, len(_SERIES), index + 1, xlabel="step", title=label)
        if points := values_of(lines, name):
            axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.grid(alpha=0.3)
    return figure


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    write_png(figure, file)
    return file.getvalue()
