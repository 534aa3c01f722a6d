"""`quantlab leaderboard`: rebuild the table from every finished run, show it, and write it as CSV or HTML."""

from __future__ import annotations

import csv as csv_module
from pathlib import Path

from quantlab.commands.guard import print_json
from quantlab.errors import DataError
from quantlab.paths import atomic_write_text, atomic_writer
from quantlab.report.leaderboard import print_table, sort_rows
from quantlab.runs.leaderboard import COLUMNS, cell, rebuild_leaderboard
from quantlab.runs.run import read_runs


def run(results: Path, *, sort: str | None, csv: Path | None, html: Path | None, as_json: bool) -> None:
    sort_rows([], sort)  # a wrong column is refused before anything is written
    if not read_runs(results):
        raise DataError(
            f"no finished run under {results / 'runs'}",
            hint="`quantlab demo` makes some; --results looks elsewhere",
        )
    rows = sort_rows(rebuild_leaderboard(results), sort)
    if csv is not None:
        with atomic_writer(csv) as stream:
            writer = csv_module.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: cell(row.get(key)) for key in COLUMNS} for row in rows)
    if html is not None:
        from quantlab.report.html import page

        atomic_write_text(html, page(rows))
    if as_json:
        print_json({"status": "done", "leaderboard": str(results / "leaderboard.csv"), "rows": rows})
        return
    print_table(rows)
    for path in (results / "leaderboard.csv", csv, html):
        if path is not None:
            print(f"written: {path}")
