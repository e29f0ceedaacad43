"""The report as tables for a terminal, and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parity_tests.reference.tolerances import ROUNDING_RATIO
from parity_tests.report.metrics import (
    Compared,
    as_json,
    first_to_drift,
    kinds,
    pooled,
    position_of_drift,
)
from parity_tests.report.outputs import disagreements, ties
from parity_tests.report.run import Report

Rows = list[tuple[str, ...]]


def summary(report: Report) -> Rows:
    """Rows of (what, ours, theirs)."""
    said, unit = report.outputs, report.unit
    programs = (said.ours, said.theirs)
    choices = [disagreements(said, each, unit) for each in programs]
    shares = [1 - len(choice) / report.length for choice in choices]
    both = (said.logits.ours, said.logits.theirs)
    rows = [
        ("loss", *(f"{each.loss:.7f}" for each in programs)),
        ("loss - oracle's", *(f"{each.loss - said.oracle.loss:+.2e}" for each in programs)),
        ("rms logit error", *(f"{each.rms:.3e}" for each in both)),
        ("largest logit error", *(f"{each.max:.3e}" for each in both)),
        ("rms logit error, ULPs", *(f"{each.ulps:.1f}" for each in both)),
        ("mean KL to the oracle", *(f"{each.kl.mean():.2e}" for each in programs)),
        ("largest KL", *(f"{each.kl.max():.2e}" for each in programs)),
        ("top-1 agreement", *(f"{share:.2%}" for share in shares)),
    ]
    if report.greedy is not None:
        same = f"{report.greedy.same} of {report.greedy.asked} tokens"
        rows.append(("identical greedy continuation", same, ""))
    return rows


def kind_rows(compared: Sequence[Compared]) -> Rows:
    """What KIND_COLUMNS say, of every kind."""
    rows = []
    for kind in kinds(compared):
        ours, theirs = ([getattr(e, side) for e in kind.members] for side in ("ours", "theirs"))
        worst = max(kind.members, key=lambda e: e.ours.rms / (e.theirs.rms or e.unit))
        rows.append(
            (
                kind.name,
                _short(kind.ours, 2),
                _short(kind.theirs, 2),
                f"{kind.ours / kind.theirs:.2f}" if kind.theirs else "",
                *(_short(max(e.max for e in side), 1) for side in (ours, theirs)),
                *(f"{pooled([e.ulps for e in side]):.0f}" for side in (ours, theirs)),
                next((part for part in worst.name.split(".") if part.isdigit()), ""),
            )
        )
    return rows


KIND_COLUMNS = (
    *("", "rms\nours", "theirs", "ratio", "max\nours", "theirs", "ULPs\nours", "theirs"),
    "worst at",
)


CHECK_COLUMNS = "", "found", "allowed", "holds"


def check_rows(report: Report, everything: bool) -> Rows:
    return [
        (check.what, f"{check.found:.2e}", f"{check.allowed:.2e}", "yes" if check.holds else "NO")
        for check in report.checks
        if everything or not check.holds
    ]


def conclusions(report: Report) -> list[str]:
    """The verdict and what it stands on, as sentences."""
    said = report.outputs
    lines = []
    module, gradient = first_to_drift(report.modules), first_to_drift(report.parameters)
    lines.append(f"first module to drift: {module or 'none'}")
    if report.parameters:
        lines.append(
            f"first gradient to drift: {gradient or 'none'} "
            f"(the first {report.backward_length} tokens, each layer from the same cotangent)"
        )
    position = position_of_drift(said.logits)
    lines.append(f"drift in the sequence begins at: {'none' if position is None else position}")
    tied = int(ties(said, report.unit).sum())
    lines.append(f"ties within the oracle's own error: {tied} of {report.length} positions")
    verdict = "holds" if report.holds else "does NOT hold"
    lines.append(
        f"the derived tolerance {verdict}: errors of {report.ours} against the float64 oracle are "
        f"{'' if report.holds else 'not '}at most {ROUNDING_RATIO} x those of {report.theirs}"
    )
    lines.append(f"took {report.seconds:.0f} s and {report.peak / 1e9:.1f} GB at its peak")
    return lines


def heading(report: Report) -> str:
    return (
        f"{report.title}: {report.ours} beside {report.theirs}, {report.dtype}, "
        f"{report.length} tokens"
    )


def show(report: Report, console: Console) -> None:
    """Print it, in 80 columns at least: in fewer its numbers would be broken up, figure by figure."""
    console.width = max(console.width, 80)
    console.print(heading(report), style="table.title", soft_wrap=True)
    console.print(_table(None, ("", report.ours, report.theirs), summary(report)))
    for title, compared in (("module by module", report.modules), ("gradients", report.parameters)):
        if compared:
            rows = [row[:-1] for row in kind_rows(compared)]  # 80 columns of text are enough
            title = f"{title}, all layers of a kind pooled, against the float64 oracle"
            console.print(_table(title, KIND_COLUMNS[:-1], rows))
    failed = check_rows(report, everything=False)
    if failed:
        console.print(_table("beyond the tolerance", CHECK_COLUMNS, failed))
    for line in conclusions(report):
        console.print(line, soft_wrap=True)


def to_json(report: Report) -> Mapping[str, Any]:
    """Every number of the report; modules in forward order, parameters in backward order."""
    said, unit = report.outputs, report.unit
    choices = {
        side: disagreements(said, getattr(said, side), unit).tolist() for side in ("ours", "theirs")
    }
    predictions = {
        side: {
            "loss": getattr(said, side).loss,
            "mean_kl": float(getattr(said, side).kl.mean()),
            "max_kl": float(getattr(said, side).kl.max()),
            "top1_agreement": 1 - len(choices[side]) / report.length,
            "top1_disagreements": choices[side],
        }
        for side in ("ours", "theirs")
    }
    return {
        "checkpoint": report.title,
        "ours": report.ours,
        "theirs": report.theirs,
        "dtype": report.dtype,
        "tokens": report.length,
        "backward_tokens": report.backward_length,
        "tolerance": ROUNDING_RATIO,
        "holds": report.holds,
        "first_module_to_drift": first_to_drift(report.modules),
        "first_gradient_to_drift": first_to_drift(report.parameters),
        "position_of_drift": position_of_drift(said.logits),
        "checks": [check._asdict() | {"holds": check.holds} for check in report.checks],
        "oracle_loss": said.oracle.loss,
        "predictions": predictions,
        "ties": np.flatnonzero(ties(said, unit)).tolist(),
        "greedy": None if report.greedy is None else report.greedy._asdict(),
        "modules": [as_json(each) for each in report.modules],
        "parameters": [as_json(each) for each in report.parameters],
        "seconds": report.seconds,
        "peak_bytes": report.peak,
    }


def _short(value: float, digits: int) -> str:
    """9.36e-6: 80 columns have no room for more."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e+") if value else "0"


def _table(title: str | None, columns: Iterable[str], rows: Rows) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for index, column in enumerate(columns):
        justify = "right" if index else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not index)
    for name, *rest in rows:
        short = name.replace("model.", "").replace("layers.*.", "").removesuffix(".weight")
        table.add_row(short, *rest)
    return table
