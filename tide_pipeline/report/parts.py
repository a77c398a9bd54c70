"""Pieces of HTML that the pages share: a section, a table, the box around a plot. Knows no data."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

DASH = "–"


class Html(str):
    """Text that is HTML already."""


def section(title: str, body: str) -> str:
    """"" without a body."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def plot_box(svg: str) -> str:
    """A plot that scrolls by itself on a narrow screen; "" without one."""
    return f'<div class="wide"><div class="plot">{svg}</div></div>' if svg else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A column that starts with # holds numbers. Cells are escaped unless they are Html. "" without rows."""
    if not rows:
        return ""
    number = [column.startswith("#") for column in columns]
    lines = []
    for row in rows:
        cells = [cell if isinstance(cell, Html) else html.escape(cell) for cell in row]
        lines.append("<tr>" + "".join(f'<td{" class=number" * n}>{cell}</td>' for cell, n in zip(cells, number, strict=True)) + "</tr>")
    return f'<div class="wide"><table>{head(*columns)}{"".join(lines)}</table></div>'


def head(*columns: str) -> str:
    """A header row."""
    cells = "".join(f'<th class="number">{html.escape(c[1:])}</th>' if c.startswith("#") else f"<th>{html.escape(c)}</th>"
                    for c in columns)
    return f"<thead><tr>{cells}</tr></thead>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def verdict(word: str, good: bool | None) -> Html:
    """None: neither good nor bad."""
    return Html(html.escape(word) if good is None else f'<span class="{"good" if good else "bad"}">{html.escape(word)}</span>')


def clock(at: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """UTC."""
    return time.strftime(form, time.gmtime(at))
