"""A verdict as text, JSON and one HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from llama_jax import html_page
from parity_tests.report.measure.metrics import Comparison, Errors, by_layer_group
from parity_tests.report.output.plots import by_name, png, shortened
from parity_tests.report.output.text import compact, table
from parity_tests.traces.check import Verdict
from parity_tests.traces.compare import JUMP, Difference, Differences
from parity_tests.traces.residuals import LIMIT, Residual

if TYPE_CHECKING:  # needs torch
    from parity_tests.traces.cause import Cause

COLUMNS = "", "rms\nrecorded", "expected", "times what\nrounding explains", "worst layer"
_SHOWN = 8  # departures in the text


def conclusions(verdict: Verdict) -> list[str]:
    """The verdict and what led to it, as sentences."""
    departures = verdict.departures
    arrays = len(verdict.values) + len(verdict.gradients) + len(verdict.steps)
    if verdict.holds:
        lines = [f"the same function: rounding explains the errors of all {arrays} arrays"]
    else:
        lines = [f"NOT THE SAME FUNCTION: {len(departures)} of {arrays} arrays depart"]
    lines += verdict.findings
    lines += verdict.notes
    if departures:
        lines.append(f"departs first: {where(departures[0], verdict.shape)}")
    lines += causes(verdict)
    if departures and departures[0].direction == "backward":
        lines.append("all values are right: the fault is in the backward pass")
    if departures and departures[0].direction == "step":
        lines.append("all gradients are right: the fault is in the optimizer")
    lines.append(
        f"compared with the {verdict.reference}; errors may be {LIMIT:g} x what rounding in "
        f"{verdict.precision} explains"
    )
    lines.append(f"took {verdict.seconds:.0f} s; peak memory {verdict.peak / 1e9:.1f} GB")
    return lines


def causes(verdict: Verdict) -> list[str]:
    """The causes, as sentences."""
    if verdict.causes is None:
        return ["torch is not installed: no cause was sought"] if verdict.departures else []
    lines = []
    for cause in verdict.causes:
        array = f"{cause.departure.name}, {cause.departure.direction}"
        if cause.name is None:
            lines.append(f"cause of {array}: unknown; no fault of the catalogue explains it")
            if cause.nearest:
                lines[-1] += f" (nearest: {cause.nearest}; {_fall(cause)})"
            continue
        if not cause.explained:  # nothing to compute with
            lines.append(f"cause of {array}: {cause.words}")
            continue
        text = f"cause: {cause.words}: with it in the oracle, the {_fall(cause)}"
        arrays = "1 departure" if cause.explained == 1 else f"{cause.explained} departures"
        text += f"; explains {arrays}{_layers(cause, verdict)}"
        if cause.equals:
            text += f". As well explained by: {', or '.join(cause.equals)}"
        lines.append(text)
    return lines


def _fall(cause: "Cause") -> str:
    before, after = (compact(value, 1) for value in (cause.departure.rms, cause.after))
    return f"error of {cause.departure.name} falls from {before} to {after}"


def _layers(cause: "Cause", verdict: Verdict) -> str:
    every = {name.split(".")[1] for name in (r.name for r in verdict.values) if "layers." in name}
    if not cause.layers:
        return ""
    if len(cause.layers) == len(every) and len(every) > 1:
        return ", in all layers"
    some = ", ".join(map(str, cause.layers[:8])) + (", ..." if len(cause.layers) > 8 else "")
    return f", in layer {some}" if len(cause.layers) == 1 else f", in layers {some}"


def where(residual: Residual, shape: tuple[int, int]) -> str:
    """Module, position, heads and direction of a departure, in words."""
    text = f"{residual.name}, {residual.direction}"
    position = first_position(residual, shape)
    if position is not None:
        row, column = position
        text += f", from position {column}" + (f" of row {row}" if shape[0] > 1 else "") + " on"
    if residual.heads:
        text += f", in heads {', '.join(map(str, residual.heads))}"
    return (
        f"{text} (error {compact(residual.rms, 1)} of its rms, {compact(residual.ratio, 1)} x what "
        "rounding explains)"
    )


def first_position(residual: Residual, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Row and position of the first departure; None for what has no positions."""
    if len(residual.by_row) != shape[0] * shape[1] or residual.name.endswith((".weight", ".bias")):
        return None
    beyond = np.flatnonzero(~(residual.by_row <= LIMIT))
    if not beyond.size:
        return None
    row, column = divmod(int(beyond[0]), shape[1])
    return row, column


def heading(verdict: Verdict) -> str:
    """The trace, what was recorded, and how many tokens."""
    batch, length = verdict.shape
    return f"{verdict.title}: {verdict.program}, {verdict.precision}, {batch} x {length} tokens"


def rows(residuals: Sequence[Residual]) -> html_page.Rows:
    """`COLUMNS` of every module or parameter, pooled over layers."""
    of_name = {residual.name: residual for residual in residuals}
    result = []
    for group in by_layer_group(map(_comparison, residuals)):
        members = [of_name[member.name] for member in group.members]
        worst = max(members, key=lambda r: np.inf if np.isnan(r.ratio) else r.ratio)
        layer = next((part for part in worst.name.split(".") if part.isdigit()), "")
        numbers = (compact(value, 2) for value in (group.ours, group.theirs))
        name = group.name.replace(".weight", " weight")  # a table leaves the suffix out
        result.append((name, *numbers, f"{worst.ratio:.3g}", layer))
    return result


def _parts(verdict: Verdict) -> tuple[tuple[str, list[Residual]], ...]:
    return (
        ("values", verdict.values),
        ("gradients", verdict.gradients),
        ("updates", verdict.steps),
    )


def show(verdict: Verdict, console: Console) -> None:
    """Print it."""
    console.width = max(console.width, 80)
    console.print(heading(verdict), style="table.title", soft_wrap=True)
    for title, residuals in _parts(verdict):
        if residuals:
            console.print(table(f"errors of {title}, pooled over layers", COLUMNS, rows(residuals)))
    departures = verdict.departures
    if departures:
        console.print("departures:")
        for residual in departures[:_SHOWN]:
            console.print(f"  {where(residual, verdict.shape)}", soft_wrap=True)
        if len(departures) > _SHOWN:
            console.print(f"  and {len(departures) - _SHOWN} more")
    for line in conclusions(verdict):
        console.print(line, soft_wrap=True)


def to_json(verdict: Verdict) -> Mapping[str, Any]:
    """Every number of the verdict."""
    first = verdict.departures[0] if verdict.departures else None
    return {
        "trace": verdict.title,
        "program": verdict.program,
        "precision": verdict.precision,
        "reference": verdict.reference,
        "tokens": list(verdict.shape),
        "holds": verdict.holds,
        "limit": LIMIT,
        "findings": verdict.findings,
        "first_to_depart": None if first is None else _numbers(first, verdict.shape),
        "causes": None if verdict.causes is None else [_of_cause(c) for c in verdict.causes],
        "values": [_numbers(residual, verdict.shape) for residual in verdict.values],
        "gradients": [_numbers(residual, verdict.shape) for residual in verdict.gradients],
        "updates": [_numbers(residual, verdict.shape) for residual in verdict.steps],
        "seconds": verdict.seconds,
        "peak_bytes": verdict.peak,
    }


def page(verdict: Verdict) -> str:
    """The HTML document."""
    body = [
        f"<h1>{escape(heading(verdict))}</h1>",
        html_page.verdict(conclusions(verdict), holds=verdict.holds),
        *(html_page.figure(*picture) for picture in _pictures(verdict)),
    ]
    for title, residuals in _parts(verdict):
        if residuals:
            every = [
                (
                    r.name,
                    f"{r.rms:.2e}",
                    f"{r.expected:.2e}",
                    f"{r.ratio:.3g}",
                    where(r, verdict.shape) if r.departs else "",
                )
                for r in residuals
            ]
            red = [residual.departs for residual in residuals]
            full = html_page.table((*COLUMNS[:-1], "departs"), every, red)
            body += [
                f"<h2>{title.capitalize()}</h2>",
                "<p>Errors of each array, computed from the recorded arrays before it, relative to its "
                "rms and pooled over layers.</p>",
                html_page.table(COLUMNS, rows(residuals)),
                f"<details><summary>All {len(residuals)}</summary>{full}</details>",
            ]
    return html_page.document(f"Check of {verdict.title}", body)


def _pictures(verdict: Verdict) -> Iterator[tuple[str, str, bytes]]:
    for residuals, label in ((verdict.values, "value"), (verdict.gradients, "gradient")):
        if not residuals:
            continue
        order = "forward" if label == "value" else "backward"
        first = next((index for index, r in enumerate(residuals) if r.departs), None)
        yield (
            f"Error by {label}",
            f"In {order} order. Each is computed from the recorded arrays before it. Expected: llama_jax "
            "in the precision of the recording.",
            by_name(
                {
                    "expected": [r.expected for r in residuals],
                    "recorded": [r.rms for r in residuals],
                },
                [r.rms / r.ratio * LIMIT if r.ratio > 0 else 0.0 for r in residuals],
                label,
                None if first is None else (first, f"departs first: {residuals[first].name}"),
            ),
        )
    by_step = [r for r in verdict.values if len(r.by_row) == np.prod(verdict.shape)]
    if by_step:
        yield (
            "Where arrays depart",
            f"Errors by position, in units of what rounding explains; above {LIMIT:g} is a departure. "
            "Rows of a batch follow each other.",
            _map(by_step),
        )


def _map(residuals: Sequence[Residual]) -> bytes:
    ratios = np.stack([shortened(np.nan_to_num(r.by_row, nan=1e9)) for r in residuals])
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="value, in forward order")
    extent = (0, len(residuals[0].by_row), len(residuals) - 0.5, -0.5)
    image = axes.imshow(
        np.clip(ratios, 1 / LIMIT, 1e6),
        aspect="auto",
        norm=LogNorm(1 / LIMIT, max(LIMIT * LIMIT, float(np.clip(ratios.max(), 1, 1e6)))),
        extent=extent,
        cmap="viridis",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="error / what rounding explains")
    return png(figure)


def _comparison(residual: Residual) -> Comparison:
    """As the report has it: the recorded program, and llama_jax."""

    def errors(rms: float, largest: float, by_row: np.ndarray) -> Errors:
        return Errors(rms, largest, rms / residual.eps, largest / residual.eps, by_row)

    recorded = errors(residual.rms, residual.largest, residual.errors)
    expected = errors(residual.expected, residual.expected_largest, residual.expected_errors)
    return Comparison(residual.name, recorded, expected, residual.eps)


def _numbers(residual: Residual, shape: tuple[int, int]) -> Mapping[str, Any]:
    position = first_position(residual, shape) if residual.departs else None
    return {
        "name": residual.name,
        "direction": residual.direction,
        "rms": residual.rms,
        "expected": residual.expected,
        "ratio": residual.ratio,
        "departs": residual.departs,
        "row": None if position is None else position[0],
        "position": None if position is None else position[1],
        "heads": list(residual.heads),
    }


def _of_cause(cause: "Cause") -> Mapping[str, Any]:
    return {
        "name": cause.name,
        "words": cause.words,
        "departure": cause.departure.name,
        "direction": cause.departure.direction,
        "rms": cause.departure.rms,
        "rms_with_it": cause.after,
        "departures_explained": cause.explained,
        "layers": list(cause.layers),
        "as_well": list(cause.equals),
    }


def show_differences(differences: Differences, console: Console) -> None:
    """Print two recordings' comparison."""
    one, other = differences.titles
    console.width = max(console.width, 80)
    console.print(f"{one} and {other}", style="table.title", soft_wrap=True)
    shown = [(d.name, compact(d.rms, 2), compact(d.largest, 2)) for d in _ends(differences.arrays)]
    console.print(table("differences, relative", ("", "rms", "largest row"), shown))
    arrays, first = len(differences.arrays), differences.first
    for line in differences.findings:
        console.print(line, soft_wrap=True)
    if differences.missing:
        names = ", ".join(differences.missing[:3])
        console.print(
            f"{len(differences.missing)} arrays in one of them only: {names}", soft_wrap=True
        )
    if first is None:
        console.print(
            f"no departure: none of {arrays} arrays differs {JUMP:g} x as much as all before it"
        )
        return
    at = "" if first.position is None else f", from position {first.position} on"
    console.print(
        f"they part at {first.name}{at}: a difference of {compact(first.rms, 1)}, more than {JUMP:g} x "
        "that of any array before it",
        soft_wrap=True,
    )


def _ends(arrays: Sequence[Difference], count: int = 12) -> list[Difference]:
    """Where they part and what is around it, or what is largest."""
    first = next((index for index, d in enumerate(arrays) if d.departs), None)
    if first is None:
        largest = sorted(arrays, key=lambda d: -d.rms)[:count]
        return [d for d in arrays if d in largest]
    start = max(0, first - count // 2)
    return list(arrays[start : start + count])


def differences_to_json(differences: Differences) -> Mapping[str, Any]:
    """Every number of two recordings' comparison."""
    return {
        "traces": list(differences.titles),
        "holds": differences.holds,
        "findings": differences.findings,
        "first_to_depart": differences.first and differences.first.name,
        "missing": differences.missing,
        "arrays": [difference._asdict() for difference in differences.arrays],
    }
