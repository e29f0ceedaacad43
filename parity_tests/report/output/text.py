"""Tables for a terminal."""

from collections.abc import Iterable
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llama_jax.html_page import Rows


def compact(value: float, digits: int) -> str:
    """9.36e-6, not 9.36e-06: the table must fit into 80 columns."""
    return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e+") if value else "0"


def table(title: str | None, columns: Iterable[str], rows: Rows) -> Table:
    """Numbers to the right of their names, which are shortened."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not index)
    for name, *cells in rows:
        short = name.replace("model.", "").replace("layers.*.", "").removesuffix(".weight")
        table.add_row(short, *cells)
    return table
