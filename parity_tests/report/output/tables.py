"""The report as tables for a terminal, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from llama_jax.html_page import Rows
from parity_tests.reference.tolerances import ROUNDING_RATIO
from parity_tests.report.measure.metrics import (
    Comparison,
    Errors,
    by_layer_group,
    first_to_drift,
    pooled,
    position_of_drift,
)
from parity_tests.report.measure.outputs import disagreements, ties
from parity_tests.report.output.text import compact, table
from parity_tests.report.run import Report

GROUP_COLUMNS = (
    *("", "rms\nours", "theirs", "ratio", "max\nours", "theirs", "ULPs\nours", "theirs"),
    "worst layer",
)
CHECK_COLUMNS = "", "measured", "allowed", "holds"


def summary(report: Report) -> Rows:
    """Rows of (quantity, ours, theirs)."""
    out, eps = report.outputs, report.eps
    programs = (out.ours, out.theirs)
    wrong = [disagreements(out, program, eps) for program in programs]
    agreement = [1 - len(positions) / report.length for positions in wrong]
    logits = (out.logits.ours, out.logits.theirs)
    rows = [
        ("loss", *(f"{program.loss:.7f}" for program in programs)),
        ("loss - oracle's", *(f"{program.loss - out.oracle.loss:+.2e}" for program in programs)),
        ("rms logit error", *(f"{error.rms:.3e}" for error in logits)),
        ("largest logit error", *(f"{error.max:.3e}" for error in logits)),
        ("rms logit error, ULPs", *(f"{error.ulps:.1f}" for error in logits)),
        ("mean KL to the oracle", *(f"{program.kl.mean():.2e}" for program in programs)),
        ("largest KL", *(f"{program.kl.max():.2e}" for program in programs)),
        ("top-1 agreement", *(f"{share:.2%}" for share in agreement)),
    ]
    if report.greedy is not None:
        tokens = f"{report.greedy.identical} of {report.greedy.generated} tokens"
        rows.append(("identical greedy continuation", tokens, ""))
    return rows


def group_rows(comparisons: Sequence[Comparison]) -> Rows:
    """`GROUP_COLUMNS` of every module or parameter, pooled over layers."""
    rows = []
    for group in by_layer_group(comparisons):
        ours, theirs = zip(*((c.ours, c.theirs) for c in group.members), strict=True)
        worst = max(group.members, key=lambda c: c.ours.rms / (c.theirs.rms or c.eps))
        rows.append(
            (
                group.name,
                compact(group.ours, 2),
                compact(group.theirs, 2),
                f"{group.ours / group.theirs:.2f}" if group.theirs else "",
                *(compact(max(error.max for error in side), 1) for side in (ours, theirs)),
                *(f"{pooled([error.ulps for error in side]):.0f}" for side in (ours, theirs)),
                next((part for part in worst.name.split(".") if part.isdigit()), ""),
            )
        )
    return rows


def check_rows(report: Report, *, only_failed: bool = False) -> Rows:
    """`CHECK_COLUMNS` of the checks."""
    return [
        (
            check.what,
            f"{check.measured:.2e}",
            f"{check.allowed:.2e}",
            "yes" if check.holds else "NO",
        )
        for check in report.checks
        if not (only_failed and check.holds)
    ]


def conclusions(report: Report) -> list[str]:
    """The verdict and what led to it, as sentences."""
    out = report.outputs
    module, gradient = first_to_drift(report.modules), first_to_drift(report.parameters)
    verdict, quantifier = (
        ("within tolerance", "all") if report.holds else ("OUT OF TOLERANCE", "not all")
    )
    lines = [
        f"{verdict}: {quantifier} errors of {report.ours} against the float64 oracle are at most "
        f"{ROUNDING_RATIO} x those of {report.theirs}",
        f"first module to drift: {module or 'none'}",
    ]
    if report.parameters:
        lines.append(
            f"first gradient to drift: {gradient or 'none'} "
            f"(the first {report.backward_length} tokens, each layer from the same cotangent)"
        )
    position = position_of_drift(out.logits)
    lines.append(f"first position to drift: {'none' if position is None else position}")
    tied = int(ties(out, report.eps).sum())
    lines.append(f"top-1 ties within the oracle's rounding: {tied} of {report.length} positions")
    lines.append(f"took {report.seconds:.0f} s; peak memory {report.peak / 1e9:.1f} GB")
    return lines


def heading(report: Report) -> str:
    """The checkpoint, the two programs, dtype and length."""
    return (
        f"{report.title}: {report.ours} and {report.theirs}, {report.dtype}, {report.length} tokens"
    )


def show(report: Report, console: Console) -> None:
    """Print it, in at least 80 columns: in fewer, numbers would be broken over lines."""
    console.width = max(console.width, 80)
    console.print(heading(report), style="table.title", soft_wrap=True)
    console.print(table(None, ("", report.ours, report.theirs), summary(report)))
    for title, comparisons in (("modules", report.modules), ("gradients", report.parameters)):
        if comparisons:
            rows = [row[:-1] for row in group_rows(comparisons)]  # the worst layer does not fit
            title = f"errors of {title} against the float64 oracle, pooled over layers"
            console.print(table(title, GROUP_COLUMNS[:-1], rows))
    failed = check_rows(report, only_failed=True)
    if failed:
        console.print(table("out of tolerance", CHECK_COLUMNS, failed))
    for line in conclusions(report):
        console.print(line, soft_wrap=True)


def to_json(report: Report) -> Mapping[str, Any]:
    """Every number of the report; modules in forward order, parameters in backward order."""
    out, eps = report.outputs, report.eps
    predictions = {}
    for side, program in (("ours", out.ours), ("theirs", out.theirs)):
        wrong = disagreements(out, program, eps).tolist()
        predictions[side] = {
            "loss": program.loss,
            "mean_kl": float(program.kl.mean()),
            "max_kl": float(program.kl.max()),
            "top1_agreement": 1 - len(wrong) / report.length,
            "top1_disagreements": wrong,
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
        "position_of_drift": position_of_drift(out.logits),
        "checks": [check._asdict() | {"holds": check.holds} for check in report.checks],
        "oracle_loss": out.oracle.loss,
        "predictions": predictions,
        "ties": np.flatnonzero(ties(out, eps)).tolist(),
        "greedy": None if report.greedy is None else report.greedy._asdict(),
        "modules": [_comparison_json(comparison) for comparison in report.modules],
        "parameters": [_comparison_json(comparison) for comparison in report.parameters],
        "seconds": report.seconds,
        "peak_bytes": report.peak,
    }


def _comparison_json(comparison: Comparison) -> Mapping[str, object]:
    def numbers(errors: Errors) -> dict[str, float]:
        return {name: getattr(errors, name) for name in ("rms", "max", "ulps", "max_ulps")}

    return {
        "name": comparison.name,
        "ours": numbers(comparison.ours),
        "theirs": numbers(comparison.theirs),
        "drifted": comparison.drifted,
    }
