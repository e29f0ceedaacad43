"""The report as one HTML page that needs no network and no other file."""

from collections.abc import Sequence
from html import escape

from llama_jax.html_page import document, figure, table, verdict
from parity_tests.report.measure.metrics import Comparison
from parity_tests.report.output.pictures import pictures
from parity_tests.report.output.tables import (
    CHECK_COLUMNS,
    GROUP_COLUMNS,
    check_rows,
    conclusions,
    group_rows,
    heading,
    summary,
)
from parity_tests.report.run import Report


def page(report: Report) -> str:
    """The HTML document."""
    body = [
        f"<h1>{escape(heading(report))}</h1>",
        verdict(conclusions(report), holds=report.holds),
        "<h2>Outputs</h2>",
        table(("", report.ours, report.theirs), summary(report)),
    ]
    body += [figure(*picture) for picture in pictures(report)]
    body += [
        "<h2>Checks</h2>",
        table(CHECK_COLUMNS, check_rows(report)),
    ]
    for title, comparisons in (("Modules", report.modules), ("Gradients", report.parameters)):
        if comparisons:
            body += [
                f"<h2>{title}</h2>",
                "<p>Errors against the float64 oracle, relative to its rms and pooled over layers. "
                "The worst layer is that of the largest ratio.</p>",
                table(GROUP_COLUMNS, group_rows(comparisons)),
                f"<details><summary>All {len(comparisons)}</summary>{_full(comparisons)}</details>",
            ]
    return document(f"Parity of {report.title}", body)


def _full(comparisons: Sequence[Comparison]) -> str:
    rows = [
        (
            comparison.name,
            f"{ours.rms:.2e}",
            f"{theirs.rms:.2e}",
            f"{ours.rms / theirs.rms:.2f}" if theirs.rms else "",
            f"{ours.max:.1e}",
            f"{theirs.max:.1e}",
            f"{ours.ulps:.2f}",
            f"{theirs.ulps:.2f}",
        )
        for comparison in comparisons
        for ours, theirs in [(comparison.ours, comparison.theirs)]
    ]
    return table(GROUP_COLUMNS[:-1], rows, [comparison.drifted for comparison in comparisons])
