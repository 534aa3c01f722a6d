"""A heat map of a model's layers: a row a projection, a column a block, one panel for each measure. SVG without
script or outside resource, with colours of its own, so that the file can be opened anywhere.

Experts of a block share a cell: their errors are averaged and their shares added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quantlab.report.svg import text, wide

Row = Mapping[str, Any]

CELL, HEIGHT, GAP, HEAD, FOOT = 16, 18, 34, 46, 24  # pixels
PALE, DARK = (247, 247, 242), (150, 20, 60)
DECADES = 3.0  # below the largest value by so many powers of ten, a cell has the palest colour
PANELS: Sequence[tuple[str, str, bool]] = (
    ("share", "share of the divergence that all errors cause", True),
    ("relative_error", "error of the output, relative to the output", False),
)


def heat_map(rows: Sequence[Row], title: str) -> str:
    """The plot as the content of a file. ``rows`` as `quantlab layers --json` has them; layers outside the blocks are
    left out, and panels that nothing is known for."""
    inside = [row for row in rows if row["block"] is not None]
    names = list(dict.fromkeys(_kind(row) for row in sorted(inside, key=lambda r: r["block"])))
    blocks = 1 + max((row["block"] for row in inside), default=0)
    left = 12 + max((wide(name) for name in names), default=0)
    width = max(left + blocks * CELL + 12, wide(title) + 24)
    panels = [panel for panel in PANELS if any(row[panel[0]] is not None for row in inside)]
    tall = len(names) * HEIGHT + GAP + FOOT
    height = HEAD + len(panels) * tall
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        text(12, 22, title),
    ]
    for number, (key, label, added) in enumerate(panels):
        top = HEAD + number * tall
        parts += _panel(_cells(inside, key, added), names, blocks, label, left, top)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _kind(row: Row) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", str(row["projection"]))


def _cells(rows: Sequence[Row], key: str, added: bool) -> dict[tuple[str, int], tuple[float, bool]]:
    """Value, and whether an override is suggested, by projection and block."""
    held: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row[key] is not None:
            held.setdefault((_kind(row), row["block"]), []).append(row)
    return {
        where: (
            math.fsum(row[key] for row in several) / (1 if added else len(several)),
            any(row.get("suggested") for row in several),
        )
        for where, several in held.items()
    }


def _panel(
    cells: Mapping[tuple[str, int], tuple[float, bool]],
    names: Sequence[str],
    blocks: int,
    label: str,
    left: float,
    top: float,
) -> list[str]:
    most = max((value for value, _ in cells.values()), default=0.0)
    parts = [text(left, top, f"{label}; darkest: {most:.2%}, logarithmic")]
    for index, name in enumerate(names):
        y = top + 8 + index * HEIGHT
        parts.append(text(left - 6, y + HEIGHT - 5, name, "end"))
        for block in range(blocks):
            if (name, block) not in cells:
                continue
            value, suggested = cells[name, block]
            edge = ' stroke="black" stroke-width="1.5"' if suggested else ' stroke="white"'
            said = f"block {block}, {name}: {value:.2%}" + (", an override is suggested" if suggested else "")
            parts.append(
                f'<rect x="{left + block * CELL:.1f}" y="{y:.1f}" width="{CELL - 1}" height="{HEIGHT - 1}" '
                f'fill="{colour(value, most)}"{edge}><title>{escape(said)}</title></rect>'
            )
    floor = top + 8 + len(names) * HEIGHT
    for block in range(0, blocks, 5):
        parts.append(text(left + (block + 0.5) * CELL, floor + 14, str(block), "middle"))
    return parts


def colour(value: float, most: float) -> str:
    """From pale to dark, by the logarithm of a value's part of the largest."""
    part = 0.0
    if value > 0 and most > 0:
        part = max(0.0, 1 + math.log10(value / most) / DECADES)
    return "#" + "".join(f"{round(p + part * (d - p)):02x}" for p, d in zip(PALE, DARK, strict=True))
