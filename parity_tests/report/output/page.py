"""The report as one HTML page that needs no network and no other file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from parity_tests.report.measure.metrics import Comparison
from parity_tests.report.output.pictures import pictures
from parity_tests.report.output.tables import (
    CHECK_COLUMNS,
    GROUP_COLUMNS,
    Rows,
    check_rows,
    conclusions,
    group_rows,
    heading,
    summary,
)
from parity_tests.report.run import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.4em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.drifted { background: #fde3e0; }
.verdict { padding: .6em 1em; border-left: 6px solid #2c8a4b; background: #eaf6ee; }
.verdict.fails { border-color: #c0392b; background: #fdecea; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption { color: #555; }
details { margin: 1em 0; overflow-x: auto; } summary { cursor: pointer; }
"""


def page(report: Report) -> str:
    """The HTML document."""
    verdict = "verdict" if report.holds else "verdict fails"
    body = [
        f"<h1>{escape(heading(report))}</h1>",
        f'<div class="{verdict}">{"<br>".join(map(escape, conclusions(report)))}</div>',
        "<h2>Outputs</h2>",
        _table(("", report.ours, report.theirs), summary(report)),
    ]
    for title, caption, png in pictures(report):
        data = base64.b64encode(png).decode()
        body.append(
            f"<h2>{escape(title)}</h2><figure>"
            f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    body += [
        "<h2>Checks</h2>",
        _table(CHECK_COLUMNS, check_rows(report)),
    ]
    for title, comparisons in (("Modules", report.modules), ("Gradients", report.parameters)):
        if comparisons:
            body += [
                f"<h2>{title}</h2>",
                "<p>Errors against the float64 oracle, relative to its rms and pooled over layers. "
                "The worst layer is that of the largest ratio.</p>",
                _table(GROUP_COLUMNS, group_rows(comparisons)),
                f"<details><summary>All {len(comparisons)}</summary>{_full(comparisons)}</details>",
            ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Parity of {escape(report.title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


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
    return _table(GROUP_COLUMNS[:-1], rows, [comparison.drifted for comparison in comparisons])


def _table(columns: Iterable[str], rows: Rows, drifted: Iterable[bool] | None = None) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for row, red in zip(rows, drifted or [False] * len(rows), strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="drifted">{cells}</tr>' if red else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
