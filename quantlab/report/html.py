"""The leaderboard as one HTML file without outside resources: a sortable table and two plots.

The plots are inline SVG: size against perplexity, and size against execution accuracy with its 95 % interval.
Everything that comes from a run is escaped. The script only sorts the table; without it the page is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from quantlab import __version__
from quantlab.report.leaderboard import SHOWN, recipe_name

Row = Mapping[str, Any]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 400, 70, 48, 16, 20
COLOURS = {"none": "#555555", "rtn": "#c0392b", "gptq": "#2471a3", "awq": "#1e8449"}

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
svg { max-width: 100%; height: auto; font-size: 12px; }
svg text { fill: currentColor; } svg .axis { stroke: currentColor; stroke-width: 1; } svg .grid { stroke: var(--line); }
"""

SCRIPT = """
for (const th of document.querySelectorAll('th')) {
  th.querySelector('button').addEventListener('click', () => {
    const rising = th.getAttribute('aria-sort') !== 'ascending', body = document.querySelector('tbody');
    const key = row => row.children[th.cellIndex].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === '' || y === '') return (x === '') - (y === '');
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return rising ? order : -order;
    });
    for (const other of document.querySelectorAll('th')) other.removeAttribute('aria-sort');
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
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>quantlab leaderboard</title><style>{STYLE}</style></head><body>\n"
        f"<h1>Leaderboard</h1>\n{table(rows)}\n"
        "<p>= marks rows that an exact paired McNemar test (5 %) cannot tell from the best. "
        "Intervals are 95 % Wilson.</p>\n"
        + "\n".join(f"<figure>{plot}</figure>" for plot in plots if plot)
        + f"\n<p>quantlab {escape(__version__)}</p>\n<script>{SCRIPT}</script></body></html>\n"
    )


def table(rows: Sequence[Row]) -> str:
    """The ranked table; every cell carries the value it sorts by."""
    head = ['<th><button type="button">#</button></th>']
    for title, _, numeric in SHOWN:
        head.append(
            f'<th{"" if numeric else " class=text"}><button type="button">{escape(title)}</button></th>'
        )
    body = []
    for rank, row in enumerate(rows, start=1):
        cells = [f'<td data-value="{rank}">{rank}</td>']
        for _, cell, numeric in SHOWN:
            text = cell(row)
            value = text.split(" ")[0] if numeric else text
            css = "" if numeric else " class=text"
            cells.append(f'<td{css} data-value="{escape(value, quote=True)}">{escape(text)}</td>')
        body.append(f'<tr title="{escape(str(row.get("run_id")), quote=True)}">{"".join(cells)}</tr>')
    return f"<table><thead><tr>{''.join(head)}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"


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
        size, value = _float(row.get("size_bytes")), _float(row.get(column))
        if size is None or value is None or size <= 0 or (logarithmic and value <= 0):
            continue
        ends = [end for name in (low, high) if (end := _float(row.get(name or ""))) is not None]
        bar = (ends[0] * scale, ends[1] * scale) if len(ends) == 2 else None
        points.append((size / 1e6, value * scale, bar, row))
    if not points:
        return ""
    x_place, x_ticks = _axis([p[0] for p in points], LEFT, WIDTH - RIGHT, logarithmic=True)
    heights = [v for p in points for v in (p[1], *(p[2] or ()))]
    y_place, y_ticks = _axis(heights, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="size against {escape(label)}">'
    ]
    for tick in x_ticks:
        x = x_place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.4g}</text>')
    for tick in y_ticks:
        y = y_place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">weights, MB</text>'
    )
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(label)}</text>'
    )
    for size, value, bar, row in points:
        x, y = x_place(size), y_place(value)
        colour = COLOURS.get(str(row.get("method")), "#8e44ad")
        name = escape(recipe_name(row))
        if bar:
            parts.append(
                f'<path stroke="{colour}" d="M{x:.1f} {y_place(bar[0]):.1f}V{y_place(bar[1]):.1f}"/>'
            )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{name}: {value:.4g}</title></circle>'
        )
        side, shift = ("end", -8) if x > WIDTH * 0.75 else ("start", 8)
        parts.append(f'<text x="{x + shift:.1f}" y="{y - 6:.1f}" text-anchor="{side}">{name}</text>')
    return "".join(parts) + "</svg>"


def _axis(
    values: Sequence[float], start: float, stop: float, *, logarithmic: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between two pixel positions, and four or five values to mark."""
    turn: Callable[[float], float] = math.log if logarithmic else float
    back: Callable[[float], float] = math.exp if logarithmic else float
    lowest, highest = turn(min(values)), turn(max(values))
    margin = 0.08 * (highest - lowest) or 0.1
    lowest, highest = lowest - margin, highest + margin

    def place(value: float) -> float:
        return start + (turn(value) - lowest) / (highest - lowest) * (stop - start)

    return place, [back(lowest + (highest - lowest) * part) for part in (0.08, 0.29, 0.5, 0.71, 0.92)]


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
