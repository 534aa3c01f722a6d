"""One swept axis as a plot: what was measured against the axis' values.

Execution accuracy with its 95 % interval, or perplexity where no cell has accuracy: a line where the values are
numbers, points where they are not. Each combination of the other axes is a series while there are at most eight;
beyond that the plot shows the mean over the combinations that were measured at every value, with bars from the lowest
to the highest. The bases that students were made from are dashed lines. A line breaks where a cell is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.report import svg
from quantlab.report.cells import Row, accuracy
from quantlab.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, finite
from quantlab.report.sweep_grid import Axes, arrange, describe, key_of, say, short, split_axis, value_of

SERIES = 8  # combinations of the other axes that are drawn apart
# Told apart by people with any colour vision, on white and on black (after Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c6bb1", "#7f7f7f")
GREY = "#888888"


@dataclass(frozen=True)
class Metric:
    """What is drawn: a column of the leaderboard, times `factor`, with the columns of its interval."""

    column: str
    label: str
    factor: float = 1.0
    interval: tuple[str, str] | None = None
    floor: float = 0.0
    ceiling: float = float("inf")
    unit: str = ""


EX = Metric("ex", "execution accuracy, %", 100, ("ex_low", "ex_high"), ceiling=100.0, unit=" %")
PPL = Metric("ppl", "perplexity (lower is better)")


@dataclass(frozen=True)
class Point:
    """A mark at the axis' value number `index`; `low` and `high` end its bar."""

    index: int
    value: float
    low: float | None
    high: float | None
    title: str


Series = tuple[str, list[Point]]  # what the legend calls it, its points in the order of the axis


def choose_metric(rows: Iterable[Row]) -> Metric:
    """Execution accuracy, or perplexity where no row has it."""
    rows = list(rows)
    with_ex = any(finite(row.get("ex")) is not None for row in rows)
    return EX if with_ex or not any(finite(row.get("ppl")) is not None for row in rows) else PPL


def axis_plot(axis: str, axes: Axes, rows: Sequence[Row], *, bases: Sequence[Row] = ()) -> tuple[str, str]:
    """(SVG, caption) of one axis; ("", "") where no cell has a number."""
    metric = choose_metric(rows)
    series, caption = _series(axis, axes, rows, metric)
    if not series:
        return "", ""
    values = axes[axis]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    lines = _base_lines(axis, axes, rows, bases, metric)
    heights = [y for _, points in series for point in points for y in _heights(point)]
    y_place, y_ticks = svg.round_scale(
        heights + [line[1] for line in lines],
        HEIGHT - BOTTOM,
        TOP,
        floor=metric.floor,
        ceiling=metric.ceiling,
    )
    centres, x_ticks, extra = _x_axis(values if numeric else _varying(axis, values), numeric)
    label = ", ".join(split_axis(axis))
    frame = svg.frame(
        [(x, words[0]) for x, words in x_ticks],
        [(y_place(tick), f"{tick:g}") for tick in y_ticks],
        svg.fit(label, WIDTH - LEFT - RIGHT),
        metric.label,
        x_grid=numeric,
        drop=14 * extra,
    )
    for x, words in x_ticks:
        for below, line in enumerate(words[1:], start=1):
            frame.append(svg.text(x, HEIGHT - BOTTOM + 16 + 14 * below, line, "middle"))
    legend, height = _legend(series, lines, HEIGHT + 14 * extra)
    # Series stand side by side, so that their bars do not hide each other.
    gap = min((b - a for a, b in itertools.pairwise(sorted(centres))), default=80.0)
    shift = min(9.0, 0.7 * gap / max(1, len(series)))
    marks = []
    for _, y, indices in lines:
        half = gap * 0.42
        starts = [(centres[i] - half, centres[i] + half) for i in indices] or [(LEFT, WIDTH - RIGHT)]
        for left, right in starts:
            marks.append(
                f'<path stroke="{GREY}" stroke-width="1.5" stroke-dasharray="6 4" fill="none" '
                f'd="M{left:.1f} {y_place(y):.1f}H{right:.1f}"/>'
            )
    for order, (_, points) in enumerate(series):
        offset = (order - (len(series) - 1) / 2) * shift
        marks += _draw(points, [x + offset for x in centres], y_place, order, joined=numeric)
    return (
        svg.opening(f"{metric.label} against {label}", height) + "".join(frame + marks + legend) + "</svg>",
        caption,
    )


def _series(axis: str, axes: Axes, rows: Sequence[Row], metric: Metric) -> tuple[list[Series], str]:
    """Name and points in the order of the axis, and what the caption says about the bars."""
    others = [other for other in axes if other != axis]
    position = {key_of(value): index for index, value in enumerate(axes[axis])}
    groups: dict[str, dict[int, Row]] = {}
    names: dict[str, str] = {}
    for point, row in arrange(axes, rows):
        rest = {other: point[other] for other in others}
        names[key_of(rest)] = describe(rest)
        found = groups.setdefault(key_of(rest), {})  # in the order of the grid, measured or not
        if row is not None and finite(row.get(metric.column)) is not None:
            found[position[key_of(point[axis])]] = row
    groups = {key: found for key, found in groups.items() if found}
    if len(groups) <= SERIES:
        series = [
            (names[key], [_point(index, row, axis, axes, metric) for index, row in sorted(found.items())])
            for key, found in groups.items()
        ]
        return series, "Bars are 95 % Wilson intervals." if metric.interval else ""
    whole = {key: found for key, found in groups.items() if len(found) == len(position)}
    chosen = whole or groups
    averaged = []
    for index in range(len(position)):
        shares = [
            float(found[index][metric.column]) * metric.factor for found in chosen.values() if index in found
        ]
        if shares:
            mean = sum(shares) / len(shares)
            title = f"{say(axes[axis][index])}: mean of {len(shares)} cells {mean:.4g}{metric.unit}"
            averaged.append(Point(index, mean, min(shares), max(shares), title))
    caption = f"Mean over {len(chosen)} combinations of {', '.join(map(short, others))}; "
    caption += "bars go from the lowest to the highest."
    if not whole:
        caption += " No combination was measured at every value yet: the means are over different cells."
    elif len(whole) < len(groups):
        caption += f" Left out: {len(groups) - len(whole)} not measured at every value yet."
    return [("mean", averaged)], caption


def _point(index: int, row: Row, axis: str, axes: Axes, metric: Metric) -> Point:
    low, high = (finite(row.get(end)) for end in metric.interval or ("", ""))
    return Point(
        index,
        float(row[metric.column]) * metric.factor,
        None if low is None else low * metric.factor,
        None if high is None else high * metric.factor,
        f"{describe({axis: axes[axis][index]})}: {measured(row, metric)}",
    )


def _base_lines(
    axis: str, axes: Axes, rows: Sequence[Row], bases: Sequence[Row], metric: Metric
) -> list[tuple[str, float, list[int]]]:
    """(name, height, indices of the values it belongs to); no indices: it goes all the way across."""
    keys = split_axis(axis)
    lines = []
    for base in bases:
        value = finite(base.get(metric.column))
        if value is None:
            continue
        named = {str(base.get(name)) for name in ("run_id", "model") if base.get(name)}
        indices = []
        if "student.model" in keys:
            for index, choice in enumerate(axes[axis]):
                model = choice if len(keys) == 1 else choice[keys.index("student.model")]
                same = [row for row in rows if key_of(value_of(row, axis)) == key_of(choice)]
                if str(model) in named or any(str(row.get("parent")) in named for row in same):
                    indices.append(index)
        name = f"base {base.get('model') or base.get('run_id')}: {value * metric.factor:.4g}{metric.unit}"
        lines.append((name, value * metric.factor, indices))
    return lines


def _x_axis(values: Sequence[Any], numeric: bool) -> tuple[list[float], list[tuple[float, list[str]]], int]:
    """(pixel of each value, ticks with their lines of words, lines of words below the first)."""
    span = WIDTH - LEFT - RIGHT
    if not numeric:
        slot = span / len(values)
        centres = [LEFT + slot * (index + 0.5) for index in range(len(values))]
        words = [svg.wrap(say(value), slot - 8, 4) for value in values]
        if len(set(map(tuple, words))) < len(values):  # cut alike: their ends tell them apart
            room = int((slot - 8) / svg.CHARACTER)
            tails = ["…" + say(value)[-(3 * room - 1) :] for value in values]
            words = [[tail[at : at + room] for at in range(0, len(tail), room)] for tail in tails]
        return centres, list(zip(centres, words, strict=True)), max(map(len, words)) - 1
    numbers = [float(value) for value in values]
    logarithmic = min(numbers) > 0 and max(numbers) / min(numbers) >= 8
    place, _ = svg.scale(numbers, LEFT, WIDTH - RIGHT, logarithmic=logarithmic)
    ticks: list[tuple[float, list[str]]] = []
    edge = float("-inf")
    for value, x in sorted(zip(values, map(place, numbers), strict=True), key=lambda pair: pair[1]):
        half = svg.wide(say(value)) / 2
        shown = x - half > edge + 4
        ticks.append((x, [say(value) if shown else ""]))
        edge = x + half if shown else edge
    return [place(value) for value in numbers], ticks, 0


def _varying(axis: str, values: Sequence[Any]) -> list[Any]:
    """The values of a grouped axis without the keys that are the same in all of them."""
    if len(split_axis(axis)) == 1:
        return list(values)
    keep = [column for column in zip(*values, strict=True) if len({key_of(value) for value in column}) > 1]
    return [list(value) for value in zip(*keep, strict=True)] if keep else list(values)


def _draw(
    points: Sequence[Point], xs: Sequence[float], y_place: svg.Place, order: int, *, joined: bool
) -> list[str]:
    """Lines between neighbouring values, bars, and marks on top."""
    colour = COLOURS[order % len(COLOURS)]
    parts = []
    if joined:
        ranks = {index: rank for rank, index in enumerate(sorted(range(len(xs)), key=lambda i: xs[i]))}
        inline = sorted(points, key=lambda point: ranks[point.index])
        for one, two in itertools.pairwise(inline):
            if ranks[two.index] == ranks[one.index] + 1:  # a missing cell breaks the line
                parts.append(
                    f'<path stroke="{colour}" stroke-width="1.5" opacity="0.7" fill="none" '
                    f'd="M{xs[one.index]:.1f} {y_place(one.value):.1f}'
                    f'L{xs[two.index]:.1f} {y_place(two.value):.1f}"/>'
                )
    for point in points:
        x = xs[point.index]
        if point.low is not None and point.high is not None:
            low, high = y_place(point.low), y_place(point.high)
            parts.append(
                f'<path stroke="{colour}" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6'
                f'M{x - 3:.1f} {high:.1f}h6"/>'
            )
        parts.append(svg.mark(order, x, y_place(point.value), colour, point.title))
    return parts


def _legend(
    series: Sequence[Series], lines: Sequence[tuple[str, float, list[int]]], top: float
) -> tuple[list[str], float]:
    """The legend below the plot, and the height of the whole; nothing for a single series without a name."""
    entries = [(order, name) for order, (name, _) in enumerate(series) if name]
    entries += [(-1, name) for name, _, _ in lines]
    wanted = max((svg.wide(name) for _, name in entries), default=0) + 34
    columns = 2 if len(entries) > 2 and wanted <= (WIDTH - 40) / 2 else 1
    parts = []
    for place, (order, name) in enumerate(entries):
        row, column = divmod(place, columns)
        x, y = 20 + column * (WIDTH - 40) / columns, top + 12 + 18 * row
        if order < 0:
            parts.append(
                f'<path stroke="{GREY}" stroke-width="1.5" stroke-dasharray="6 4" d="M{x:.1f} {y:.1f}h20"/>'
            )
        else:
            parts.append(svg.mark(order, x + 10, y, COLOURS[order % len(COLOURS)], name))
        parts.append(svg.text(x + 28, y + 4, svg.fit(name, (WIDTH - 40) / columns - 34)))
    return parts, top + (18 * -(-len(entries) // columns) + 10 if entries else 0)


def measured(row: Row, metric: Metric) -> str:
    if metric is EX:
        return f"{accuracy(row)} %"
    return f"{metric.column} {float(row[metric.column]):.4g}"


def goodness(row: Row, metric: Metric) -> float:
    value = float(row[metric.column])
    return value if metric is EX else -value


def _heights(point: Point) -> list[float]:
    return [height for height in (point.value, point.low, point.high) if height is not None]
