"""The plot of `real_model.py`: KL divergence to the original against size, a mark for each way, a colour for each tool.

The divergence is on a logarithmic axis, as it spans three orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 540, 64, 170, 40, 52
INK, FAINT = "#24292f", "#d0d7de"
# Told apart by people with any colour vision (after Okabe and Ito).
COLOURS = {
    "quantlab": "#0072b2",
    "gptqmodel": "#d55e00",
    "llmcompressor": "#009e73",
    "llama.cpp": "#cc79a7",
}


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """The SVG of ways that have a divergence."""
    shown = [row for row in rows if row["kl_mean"]]
    if not shown:
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"/>\n'
    sizes, levels = [row["bytes"] / 1e6 for row in shown], [row["kl_mean"] for row in shown]
    least, most = min(sizes) - 3, max(sizes) + 3
    low, high = math.floor(math.log10(min(levels))), math.ceil(math.log10(max(levels)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12" '
        'aria-label="KL divergence to the original against size">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(
            LEFT, 22, "KL divergence to the original (lower is better), against size on disk", weight="600"
        ),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "MB", anchor="middle"),
    ]

    def across(size: float) -> float:
        return LEFT + (size - least) / (most - least) * (WIDTH - RIGHT - LEFT)

    def down(level: float) -> float:
        return TOP + (high - math.log10(level)) / (high - low) * (HEIGHT - BOTTOM - TOP)

    for exponent in range(low, high + 1):
        y = down(10.0**exponent)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{FAINT}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{10.0**exponent:g}", anchor="end"))
    step = next(step for step in (5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if (most - least) / step <= 10)
    for tick in range(math.ceil(least / step) * step, int(most) + 1, step):
        parts.append(_text(across(tick), HEIGHT - BOTTOM + 20, f"{tick}", anchor="middle"))
    taken: list[tuple[float, float]] = []
    for row, size, level in sorted(zip(shown, sizes, levels, strict=True), key=lambda one: one[2]):
        x, y, colour = across(size), down(level), COLOURS.get(row["tool"], INK)
        title = f"{row['tool']} {row['name']}: {size:.1f} MB, KL {level:.4f}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" fill-opacity="0.85">'
            f"<title>{escape(title)}</title></circle>"
        )
        if all(abs(x - other) > 110 or abs(y - height) > 12 for other, height in taken):
            parts.append(_text(x + 7, y + 4, row["name"], size=10))
            taken.append((x, y))
    for number, (tool, colour) in enumerate(COLOURS.items()):
        y = TOP + 18 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 40}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 52, y + 4, tool))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, said: str, anchor: str = "start", weight: str = "400", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(said)}</text>'
    )
