"""The leaderboard as a ranked table on the terminal, and sorted by a column.

Rank is execution accuracy, then perplexity. Rows marked `=` do not differ significantly from the best by a paired exact
McNemar test at 5 %: their order among themselves says nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantlab.errors import RecipeError
from quantlab.paths import nearest, slug
from quantlab.registry.tasks import task_columns
from quantlab.report.cells import cell_of, conditions_of, number, speed
from quantlab.runs.leaderboard import COLUMNS

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str], bool]

# Columns where more is better; every other number is better small.
DESCENDING = {column.name for column in task_columns() if column.higher} | {"finished_at"}


def sort_rows(rows: Iterable[Row], column: str | None) -> list[Row]:
    """Rows by a column, best first, rows without a value last; by the rank of the leaderboard when None."""
    rows = list(rows)
    if column is None:
        return rows
    if column not in COLUMNS:
        near = nearest(column, COLUMNS)
        raise RecipeError(
            f"--sort {column}: no such column",
            hint=f"did you mean {near}?" if near else "columns: " + ", ".join(COLUMNS),
        )
    filled = [row for row in rows if row.get(column) not in (None, "")]
    empty = [row for row in rows if row.get(column) in (None, "")]
    return sorted(filled, key=lambda row: row[column], reverse=column in DESCENDING) + empty


def recipe_name(row: Row) -> str:
    """The recipe's name inside the run id `<model>-<recipe>-<hash>`."""
    name = str(row["run_id"]).removeprefix(slug(str(row.get("model") or "")) + "-")
    return name.rsplit("-", 1)[0]


def megabytes(row: Row) -> str:
    return number(row.get("size_bytes"), "{:.2f}", 1e-6)


# Title, how a row's cell is written, and whether it is a number. The whole row is in leaderboard.csv.
SHOWN: Sequence[Column] = (
    ("recipe", recipe_name, False),
    ("model", lambda row: str(row.get("model") or ""), False),
    ("bits/w", lambda row: number(row.get("bits_per_weight"), "{:.2f}"), True),
    ("MB", megabytes, True),
    *((c.title, cell_of(c), c.written != "quantlab.report.cells:tied") for c in task_columns() if c.title),
    ("work s", lambda row: number(row.get("work_seconds"), "{:.1f}"), True),
)


def conditions(rows: Sequence[Row]) -> list[str]:
    """What the numbers were measured on: a line for each text or set of questions, where rows have one."""
    found = []
    for column in task_columns():
        said = {", ".join(conditions_of(column, row)) for row in rows} - {""}
        if said:
            found.append(f"{column.title.split(' ')[0]} on {' | '.join(sorted(said))}")
    texts = {str(row["calibration"]) for row in rows if row.get("calibration")}
    return found + ([f"calibrated on {' | '.join(sorted(texts))}"] if texts else [])


def print_table(rows: Sequence[Row]) -> None:
    """The ranked table on stdout; columns that no row has are left out, as is the model when it is the same for all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="ranked by execution accuracy, then perplexity", title_justify="left", pad_edge=False)
    table.add_column("#", justify="right")
    shown = []
    same_model = len({row.get("model") for row in rows}) == 1
    for title, cell, numeric in SHOWN:
        if any(cell(row) for row in rows) and not (title == "model" and same_model):
            shown.append(cell)
            table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for rank, row in enumerate(rows, start=1):
        table.add_row(str(rank), *(Text(cell(row)) for cell in shown))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)
    if any(row.get("tie_group") for row in rows):
        print("= not significantly different from the best row (exact paired McNemar test, 5 %)")
    for line in conditions(rows):
        print(line)
    if any(speed(row).endswith("~") for row in rows):
        print("~ speed was disturbed: other processes took processor time; measure again on a quiet machine")
