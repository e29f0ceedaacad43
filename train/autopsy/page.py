"""What was found out about a step, as one HTML page."""

import io
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.files.staging import replacing, write_text
from llama_jax.html_page import document, figure, table, verdict
from train.autopsy.layer_causes import layer_comparisons
from train.autopsy.result import Autopsy
from train.autopsy.text import conclusions, document_rows, replayed
from train.monitoring.metrics_log import write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AROUND = 64  # steps to draw before the one in question


def write_page(autopsy: Autopsy, page: Path) -> None:
    """Write the page to a file."""
    title = f"Step {autopsy.step} of {autopsy.replay.folder.name}"
    with replacing(page) as staged:
        write_text(staged, document(title, _body(title, autopsy)))


def _body(title: str, autopsy: Autopsy) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    yield verdict(conclusions(autopsy), holds=not autopsy.causes)
    yield f"<p>{escape(replayed(autopsy))}.</p>"
    yield table(
        ("", "value", "spreads above what was expected"),
        [
            (
                symptom.name,
                f"{symptom.value:.6g}",
                "" if symptom.comparison is None else f"{symptom.comparison.surprise:+.1f}",
            )
            for symptom in autopsy.symptoms
        ],
        [symptom.unusual for symptom in autopsy.symptoms],
    )
    yield figure("Loss", "Recorded, and what would have happened.", _png(_losses(autopsy)))
    yield "<h2>What would have happened</h2>"
    last = max((len(outcome.losses) for outcome in autopsy.outcomes), default=0)
    yield table(
        ("", *(f"loss of step {autopsy.step + number}" for number in range(last))),
        [
            (outcome.name, *("" if x is None else f"{x:.4f}" for x in outcome.losses))
            for outcome in autopsy.outcomes
        ],
    )
    yield "<h2>Documents</h2>"
    yield table(("row", "tokens", "", "", "", "", "", "", "begins"), document_rows(autopsy))
    yield "<h2>Layers</h2>"
    yield "<p>Spreads above what the steps before lead to expect; and root mean squares.</p>"
    yield table(*_layers(autopsy))
    yield figure(
        "Gradients of the documents by layer",
        "Norm of each document's part of the gradient, in the order of the table.",
        _png(_by_layer(autopsy)),
    )
    yield "<h2>Optimizer</h2>"
    terms = autopsy.recorded.terms
    yield table(
        ("", ""),
        [
            ("learning rate", f"{terms.learning_rate:.6g}"),
            ("gradient scaled by clipping", f"{terms.clip:.6g}"),
            ("norm of the update", f"{terms.update:.6g}"),
            ("by gradients", f"{terms.direction:.6g}"),
            ("by weight decay", f"{terms.decay:.6g}"),
        ],
    )
    yield f"<p>Recorded in {autopsy.recorded.dtype}.</p>"


def _layers(autopsy: Autopsy) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    compared = layer_comparisons(autopsy.history)
    branches = autopsy.recorded.branches
    columns = "layer", *compared, "input, rms", "attention adds", "MLP adds"
    rows = []
    for layer in range(len(branches.residual)):
        surprises = (values[layer] for values in compared.values())
        rows.append(
            (
                str(layer),
                *("" if value is None else f"{value.surprise:+.1f}" for value in surprises),
                *(f"{values[layer]:.4g}" for values in branches),
            )
        )
    return columns, rows


def _losses(autopsy: Autopsy) -> "Figure":
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4), layout="constrained")
    axes = drawing.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    horizon = max((len(outcome.losses) for outcome in autopsy.outcomes), default=1)
    points = [
        (step, line["loss"])
        for step, line in sorted(autopsy.replay.recorded.items())
        if autopsy.step - _AROUND <= step < autopsy.step + horizon and line["loss"] is not None
    ]
    if points:
        axes.plot(*zip(*points, strict=True), color="black", linewidth=1.5, label="recorded")
    for outcome in autopsy.outcomes:
        steps = range(autopsy.step, autopsy.step + len(outcome.losses))
        values = [np.nan if loss is None else loss for loss in outcome.losses]
        axes.plot(steps, values, marker=".", linewidth=1, label=outcome.name)
    axes.axvline(autopsy.step, color="gray", linestyle=":")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return drawing


def _by_layer(autopsy: Autopsy) -> "Figure":
    from matplotlib.figure import Figure

    contributions = sorted(autopsy.recorded.contributions, key=lambda one: -one.norm)
    values = np.array([one.by_layer for one in contributions]).T
    drawing = Figure(figsize=(10, 0.8 + 0.3 * len(values)), layout="constrained")
    axes = drawing.add_subplot(xlabel="document")
    mesh = axes.pcolormesh(values)
    axes.set_yticks(np.arange(len(values)) + 0.5, autopsy.recorded.groups, fontsize=7)
    drawing.colorbar(mesh, ax=axes)
    return drawing


def _png(drawing: "Figure") -> bytes:
    file = io.BytesIO()
    write_png(drawing, file)
    return file.getvalue()
