"""A sweep as a page and as CSV: a plot for each swept axis and the table of the cells.

A sweep that has not finished is shown as far as it is: cells without a result are counted and named.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from quantlab.paths import atomic_write_text, atomic_writer
from quantlab.report.axis_plot import axis_plot, choose_metric, goodness, measured
from quantlab.report.cells import Row, accuracy, flipped, number
from quantlab.report.html import document, table
from quantlab.report.leaderboard import Column
from quantlab.report.svg import finite
from quantlab.report.sweep_grid import Axes, arrange, describe, keys_of, names_of, say, split_axis, spread
from quantlab.runs.leaderboard import COLUMNS, cell

NAMED = 40  # missing cells that are named one by one


def write_sweep(
    directory: Path, axes: Axes, rows: Sequence[Row], *, bases: Sequence[Row] = (), title: str = "Sweep"
) -> tuple[Path, Path]:
    """Write `sweep.html` and `sweep.csv` into `directory`; returns both paths.

    `axes` is the recipe's `sweep`. Each row is one of the leaderboard that also has a value for every axis, under the
    axis' name or under its keys. `bases` are the leaderboard rows of the models that the students were made from.
    DataError for a row that is no cell of the grid, and for two rows of one cell.
    """
    page_file, csv_file = directory / "sweep.html", directory / "sweep.csv"
    found = arrange(axes, rows)
    columns = [*keys_of(axes), *COLUMNS]
    with atomic_writer(csv_file) as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for point, row in found:
            values = {key: _csv(value) for key, value in spread(point).items()}
            writer.writerow(values | {column: cell((row or {}).get(column)) for column in COLUMNS})
    atomic_write_text(page_file, page(axes, rows, bases=bases, title=title))
    return page_file, csv_file


def page(axes: Axes, rows: Sequence[Row], *, bases: Sequence[Row] = (), title: str = "Sweep") -> str:
    """The whole page; see `write_sweep`."""
    found = arrange(axes, rows)
    metric = choose_metric(rows)
    done = [(point, row) for point, row in found if row is not None]
    missing = [point for point, row in found if row is None]
    body = [f"<h1>{escape(title)}</h1>", f"<p>{len(done)} of {len(found)} cells have a result."]
    scored = [(point, row) for point, row in done if finite(row.get(metric.column)) is not None]
    if scored:
        best = max(scored, key=lambda pair: goodness(pair[1], metric))
        text = f"Best: {describe(best[0])}, {measured(best[1], metric)}."
        if len(scored) > 1:
            text += f" Being the best of {len(scored)} on the same items makes it look better than it is."
        body.append(escape(text))
    body.append("</p>")
    for axis, values in axes.items():
        if len(values) > 1:
            plot, caption = axis_plot(axis, axes, rows, bases=bases)
            if plot:
                below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
                body.append(f"<figure>{plot}{below}</figure>")
    body.append(table([point | dict(row) for point, row in done], _columns(axes)))
    if missing:
        body.append(f"<h2>Cells without a result: {len(missing)}</h2>\n<ul>")
        body += [f"<li>{escape(describe(point))}</li>" for point in missing[:NAMED]]
        body.append(f"<li>and {len(missing) - NAMED} more</li>" if len(missing) > NAMED else "")
        body.append("</ul>\n<p>The same command goes on with them.</p>")
    return document(f"quantlab: {title}", "\n".join(part for part in body if part))


def _columns(axes: Axes) -> list[Column]:
    """The table's columns: a column a swept key, then what was measured."""
    shown: list[Column] = []
    names = dict(zip(keys_of(axes), names_of(keys_of(axes)), strict=True))
    for axis, values in axes.items():
        for key in split_axis(axis):
            numeric = all(isinstance(spread({axis: value})[key], int | float) for value in values)

            def said(row: Row, axis: str = axis, key: str = key) -> str:
                return say(spread({axis: row[axis]})[key])

            shown.append((names[key], said, numeric))
    shown += [
        ("EX % [95 %]", accuracy, True),
        ("EM %", lambda row: "" if row.get("em") is None else f"{100 * float(row['em']):.1f}", True),
        ("lost/gained", flipped, True),
        ("ppl", lambda row: number(row.get("ppl"), "{:.3f}"), True),
        ("work s", lambda row: number(row.get("work_seconds"), "{:.1f}"), True),
        ("run", lambda row: str(row.get("run_id") or ""), False),
    ]
    return shown


def _csv(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else cell(value)
