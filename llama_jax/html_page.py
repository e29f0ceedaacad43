"""Parts of an HTML page that needs no network and no other file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

Rows = Sequence[tuple[str, ...]]

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


def document(title: str, body: Iterable[str]) -> str:
    """The whole page, of elements."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def verdict(lines: Iterable[str], *, holds: bool) -> str:
    """The conclusions, on green or red."""
    kind = "verdict" if holds else "verdict fails"
    return f'<div class="{kind}">{"<br>".join(map(escape, lines))}</div>'


def figure(title: str, caption: str, png: bytes) -> str:
    """A picture under a heading."""
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{escape(title)}</h2><figure>"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(columns: Iterable[str], rows: Rows, drifted: Iterable[bool] | None = None) -> str:
    """Rows of text; those that have drifted are red."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for row, red in zip(rows, drifted or [False] * len(rows), strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="drifted">{cells}</tr>' if red else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
