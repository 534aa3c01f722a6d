"""The picture of the published run: `python -m tools.docs.picture` draws `docs/assets/leaderboard.svg`.

From `results/leaderboard.csv` alone: on the left execution accuracy with its 95 % interval, on the right the size of
the weights, one line per model: the base, the student, and the quantized students by size.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from quantlab.registry.methods import METHODS
from quantlab.report.leaderboard import recipe_name

ROOT = Path(__file__).parents[2]
CSV, PICTURE = ROOT / "results" / "leaderboard.csv", ROOT / "docs" / "assets" / "leaderboard.svg"
WIDTH, LINE, TOP, BOTTOM = 760, 28, 46, 44
# where names start, and the two scales from pixel to pixel
NAMES, ACCURACY, SIZE = (
    10,
    (170, 490),
    (560, 690),
)
INK, FAINT, PLAIN = "#24292f", "#d0d7de", "#555555"

Row = Mapping[str, str]


def draw(rows: Sequence[Row]) -> str:
    """The SVG of rows as `leaderboard.csv` has them; those without accuracy or size are left out."""
    shown = [row for row in rows if row["ex"] and row["size_bytes"]]
    stages = ("base", "student")
    shown.sort(key=lambda row: (row["stage"] not in stages, row["stage"], -int(row["size_bytes"])))
    height = TOP + LINE * len(shown) + BOTTOM
    largest = max(int(row["size_bytes"]) for row in shown) / 1e6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13" '
        'aria-label="Execution accuracy and size of the models of the published run">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(ACCURACY[0], 24, "execution accuracy, % [95 % interval]", weight="600"),
        _text(SIZE[0], 24, "weights, MB", weight="600"),
    ]
    floor = height - BOTTOM + 6
    for tick in range(0, 101, 20):
        x = _place(tick, 100, ACCURACY)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{floor}" stroke="{FAINT}"/>')
        parts.append(_text(x, floor + 18, f"{tick}", anchor="middle"))
    for number, row in enumerate(shown):
        y = TOP + LINE * (number + 0.5)
        parts += _line(row, y, largest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(row: Row, y: float, largest: float) -> list[str]:
    colour = METHODS[row["method"]].colour if row["stage"] == "quantized" else PLAIN
    low, value, high = (_place(100 * float(row[name]), 100, ACCURACY) for name in ("ex_low", "ex", "ex_high"))
    size = int(row["size_bytes"]) / 1e6
    right = _place(size, largest, SIZE)
    return [
        _text(NAMES, y + 4, name_of(row)),
        f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{value:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>',
        _text(high + 6, y + 4, f"{100 * float(row['ex']):.1f}"),
        f'<rect x="{SIZE[0]}" y="{y - 8:.1f}" width="{right - SIZE[0]:.1f}" height="16" fill="{colour}"/>',
        _text(right + 6, y + 4, f"{size:.1f}"),
    ]


def name_of(row: Row) -> str:
    """`base`, `student`, or the name of the recipe."""
    return row["stage"] if row["stage"] in ("base", "student") else recipe_name(row)


def _place(value: float, largest: float, ends: tuple[int, int]) -> float:
    return ends[0] + value / largest * (ends[1] - ends[0])


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}">'
        f"{escape(words)}</text>"
    )


def main() -> None:
    with CSV.open(encoding="utf-8", newline="") as stream:
        text = draw(list(csv.DictReader(stream)))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(text, encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
