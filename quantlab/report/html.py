"""The leaderboard as one HTML file without outside resources: a sortable table and two plots.

The plots are inline SVG: size against perplexity, and size against execution accuracy with its 95 % interval.
Everything that comes from a run is escaped. The script only sorts the table; without it the page is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quantlab import __version__
from quantlab.registry.methods import METHODS
from quantlab.report import svg
from quantlab.report.leaderboard import SHOWN, Column, recipe_name
from quantlab.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, finite

Row = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figure { display: inline-block; margin: 1rem 1rem 0 0; max-width: 100%; }
"""
STYLE += svg.STYLE

SCRIPT = """
for (const th of document.querySelectorAll('table.sortable th')) {
  th.querySelector('button').addEventListener('click', () => {
    const rising = th.getAttribute('aria-sort') !== 'ascending', body = th.closest('table').tBodies[0];
    const key = row => row.children[th.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === '' || y === '') return (x === '') - (y === '');
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return rising ? order : -order;
    });
    for (const other of th.parentElement.cells) other.removeAttribute('aria-sort');
    th.setAttribute('aria-sort', rising ? 'ascending' : 'descending');
    body.append(...rows);
  });
}
"""


def page(rows: Sequence[Row]) -> str:
    """The whole page for rows of the leaderboard, in their order."""
    plots = [
        scatter(rows, "ppl", "perplexity (lower is better)", logarithmic=True),
        scatter(
            rows, "ex", "execution accuracy, % (higher is better)", scale=100, low="ex_low", high="ex_high"
        ),
    ]
    return document(
        "quantlab leaderboard",
        f"<h1>Leaderboard</h1>\n{table(rows)}\n"
        "<p>= marks rows that an exact paired McNemar test (5 %) cannot tell from the best. "
        "Intervals are 95 % Wilson.</p>\n" + "\n".join(f"<figure>{plot}</figure>" for plot in plots if plot),
    )


def document(title: str, body: str) -> str:
    """A whole page around a body that is HTML already; `title` is escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"{body}\n<p>quantlab {escape(__version__)}</p>\n<script>{SCRIPT}</script></body></html>\n"
    )


def table(rows: Sequence[Row], shown: Sequence[Column] = SHOWN) -> str:
    """The ranked table, which the page's script sorts; every cell carries the value it sorts by."""
    head = ['<th><button type="button">#</button></th>']
    for title, _, numeric in shown:
        head.append(
            f'<th{"" if numeric else " class=text"}><button type="button">{escape(title)}</button></th>'
        )
    body = []
    for rank, row in enumerate(rows, start=1):
        cells = [f'<td data-value="{rank}">{rank}</td>']
        for _, cell, numeric in shown:
            text = cell(row)
            value = text.split(" ")[0] if numeric else text
            css = "" if numeric else " class=text"
            cells.append(f'<td{css} data-value="{escape(value, quote=True)}">{escape(text)}</td>')
        body.append(f'<tr title="{escape(str(row.get("run_id")), quote=True)}">{"".join(cells)}</tr>')
    return (
        f'<table class="sortable"><thead><tr>{"".join(head)}</tr></thead><tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table>"
    )


def scatter(
    rows: Sequence[Row],
    column: str,
    label: str,
    *,
    scale: float = 1,
    low: str | None = None,
    high: str | None = None,
    logarithmic: bool = False,
) -> str:
    """Size in MB (logarithmic) against a column, an error bar where `low` and `high` are filled; "" without points."""
    points = []
    for row in rows:
        size, value = finite(row.get("size_bytes")), finite(row.get(column))
        if size is None or value is None or size <= 0 or (logarithmic and value <= 0):
            continue
        ends = [end for name in (low, high) if (end := finite(row.get(name or ""))) is not None]
        bar = (ends[0] * scale, ends[1] * scale) if len(ends) == 2 else None
        points.append((size / 1e6, value * scale, bar, row))
    if not points:
        return ""
    x_place, x_ticks = svg.scale([p[0] for p in points], LEFT, WIDTH - RIGHT, logarithmic=True)
    heights = [v for p in points for v in (p[1], *(p[2] or ()))]
    y_place, y_ticks = svg.scale(heights, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    parts = [svg.opening(f"size against {label}")]
    parts += svg.frame(
        [(x_place(tick), f"{tick:.4g}") for tick in x_ticks],
        [(y_place(tick), f"{tick:.4g}") for tick in y_ticks],
        "weights, MB",
        label,
    )
    for size, value, bar, row in points:
        x, y = x_place(size), y_place(value)
        colour = _colour(str(row.get("method")))
        name = recipe_name(row)
        if bar:
            parts.append(
                f'<path stroke="{colour}" d="M{x:.1f} {y_place(bar[0]):.1f}V{y_place(bar[1]):.1f}"/>'
            )
        parts.append(svg.mark(0, x, y, colour, f"{name}: {value:.4g}"))
        side, shift = ("end", -8) if x > WIDTH * 0.75 else ("start", 8)
        parts.append(svg.text(x + shift, y - 6, name, side))
    return "".join(parts) + "</svg>"


def _colour(method: str) -> str:
    found = METHODS.get(method)
    return found.colour if found else "#8e44ad"
