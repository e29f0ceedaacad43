"""metrics.jsonl: one line of metrics for every step and evaluation; and the picture of the loss."""

import json
from pathlib import Path
from typing import Any, TextIO

from llama_jax.files.staging import replacing, write_text, writing

FILE = "metrics.jsonl"
PICTURE = "loss.png"

# metrics that differ between two runs of the same computation
TIMES = ("seconds", "tokens_per_second", "mfu", "data_wait")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's file; a last one that a crash cut off is left out."""
    path = run / FILE
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    # what follows the last newline is not a line
    return [json.loads(line) for line in lines[:-1] if line]


def open_metrics(run: Path, step: int) -> TextIO:
    """The file, open for appending, without the lines of steps after `step`: they will be run again."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step]
    with replacing(run / FILE) as staged:
        write_text(staged, "".join(kept))
    return (run / FILE).open("a", encoding="utf-8")


def write_line(file: TextIO, metrics: dict[str, Any]) -> None:
    """Append a line and flush it to the operating system."""
    with writing(Path(file.name)):
        file.write(json.dumps(metrics) + "\n")
        file.flush()


_BY_SOURCE = "validation_loss/"  # before the name of a source of a mixture


def draw_loss(run: Path) -> None:
    """loss.png: training and validation loss over steps; of a mixture also that of each source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(run)
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validation = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", label="validation")
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(_BY_SOURCE))
    for name in names:
        values = [(line["step"], line[name]) for line in lines if name in line]
        label = f"validation, {name.removeprefix(_BY_SOURCE)}"
        axes.plot(*zip(*values, strict=True), marker=".", linewidth=1, label=label)
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    with replacing(run / PICTURE) as staged:
        FigureCanvasAgg(figure).print_png(staged)
