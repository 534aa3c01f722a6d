"""Pieces of plots as inline SVG: scales, ticks, the frame with its grid, point marks, lines of text that fit.

Plots need no script and no outside resource; colours of text and axes follow the page (`STYLE`). All text that goes
through here is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

Place = Callable[[float], float]

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 400, 70, 48, 16, 20
CHARACTER = (
    6.8  # pixels that a character of the 12-pixel text takes, on the wide side; Hangul takes twice that
)

STYLE = """
svg { max-width: 100%; height: auto; font-size: 12px; }
svg text { fill: currentColor; } svg .axis { stroke: currentColor; stroke-width: 1; } svg .grid { stroke: var(--line); }
"""


def finite(value: Any) -> float | None:
    """The number that a cell holds, None for anything else and for what is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def scale(
    values: Sequence[float], start: float, stop: float, *, logarithmic: bool
) -> tuple[Place, list[float]]:
    """Where a value lies between two pixel positions, and five values to mark."""
    turn: Callable[[float], float] = math.log if logarithmic else float
    back: Callable[[float], float] = math.exp if logarithmic else float
    lowest, highest = turn(min(values)), turn(max(values))
    margin = 0.08 * (highest - lowest) or 0.1
    lowest, highest = lowest - margin, highest + margin

    def place(value: float) -> float:
        return start + (turn(value) - lowest) / (highest - lowest) * (stop - start)

    return place, [back(lowest + (highest - lowest) * part) for part in (0.08, 0.29, 0.5, 0.71, 0.92)]


def round_scale(
    values: Sequence[float], start: float, stop: float, *, floor: float = -math.inf, ceiling: float = math.inf
) -> tuple[Place, list[float]]:
    """A linear scale from a round number to a round number around the values, within `floor` and `ceiling`."""
    lowest, highest = min(values), max(values)
    rough = max(highest - lowest, 0.02 * abs(highest), 1e-6) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    if first == last:
        first, last = first - 1, last + 1
    ticks = [round(step * index, 10) for index in range(first, last + 1)]
    ticks = [tick for tick in ticks if floor <= tick <= ceiling]

    def place(value: float) -> float:
        return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (stop - start)

    return place, ticks


def opening(label: str, height: float = HEIGHT) -> str:
    """The opening tag of a plot; `label` is what a screen reader says."""
    said = escape(label, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img" aria-label="{said}">'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def frame(
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
    *,
    x_grid: bool = True,
    drop: float = 0,
) -> list[str]:
    """Grid lines with their words at pixel positions, the axes and their labels; `drop` lowers the x label."""
    floor, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for x, words in x_ticks:
        if x_grid:
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        if words:
            parts.append(text(x, floor + 16, words, "middle"))
    for y, words in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 6, y + 4, words, "end"))
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8 + drop, x_label, "middle"))
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    return parts


def mark(shape: int, x: float, y: float, colour: str, title: str) -> str:
    """A point as circle, square, triangle or diamond (`shape` modulo 4), so that colour is not all that tells."""
    form = shape % 4
    inside = f"<title>{escape(title)}</title>"
    if form == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{inside}</circle>'
    if form == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}">{inside}</rect>'
    corners = [(0, -5.5), (5, 4), (-5, 4)] if form == 2 else [(0, -6), (6, 0), (0, 6), (-6, 0)]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" fill="{colour}">{inside}</polygon>'


def wide(words: str) -> float:
    """Pixels that words take, about; East Asian characters count twice."""
    return sum(CHARACTER * (2 if ord(character) >= 0x1100 else 1) for character in words)


def fit(words: str, pixels: float) -> str:
    """The words, or their beginning and an ellipsis where they would take more than `pixels`."""
    if wide(words) <= pixels:
        return words
    while words and wide(words) > pixels - CHARACTER:
        words = words[:-1]
    return words.rstrip() + "…"


def wrap(words: str, pixels: float, lines: int) -> list[str]:
    """The words in at most `lines` lines of at most `pixels`, broken behind blanks, commas, dashes and slashes."""
    pieces: list[str] = [""]
    for character in words:
        pieces[-1] += character
        if character in " ,-/_:":
            pieces.append("")
    rows = [""]
    for piece in pieces:
        if rows[-1] and wide(rows[-1] + piece.rstrip()) > pixels:
            rows.append("")
        rows[-1] += piece
    if len(rows) > lines:
        rows = [*rows[: lines - 1], "".join(rows[lines - 1 :])]
    return [fit(row.strip(), pixels) for row in rows]
