"""A table of results, for the terminal, for Markdown and for JSON."""

from typing import Any, NamedTuple

from rich.table import Table

from llama_jax import formatting


class Report(NamedTuple):
    """Rows of text, the first column a name; notes are lines below; values are numbers, unrounded."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    notes: list[str]
    values: list[dict[str, Any]]


def show(report: Report) -> None:
    """Print it as a table."""
    table = Table(title=report.title)
    for column in report.columns:
        table.add_column(column, justify="right" if column else "left")
    for row in report.rows:
        table.add_row(*row)
    console = formatting.console(width=120)
    console.print(table)
    for note in report.notes:
        console.print(note)


def markdown(report: Report) -> str:
    """A heading, the table and the notes."""
    lines = [f"## {report.title}", ""]
    lines += [_line(report.columns), _line(["---"] * len(report.columns))]
    lines += [_line(row) for row in report.rows]
    return "\n".join([*lines, "", *report.notes, ""])


def _line(cells: Any) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
