"""The leaderboard as a ranked table on the terminal, and sorted by a column.

Rank is execution accuracy, then perplexity. Rows marked `=` cannot be told from the best by a paired exact McNemar
test at 5 %: their order among themselves says nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantlab.errors import RecipeError
from quantlab.paths import nearest, slug
from quantlab.runs.leaderboard import COLUMNS

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str], bool]

# Columns where more is better; every other number is better small.
DESCENDING = {
    "ex",
    "ex_low",
    "ex_high",
    "em",
    "judge",
    "top1_agreement",
    "gained",
    "prefill_tok_s",
    "prefill_ratio",
    "decode_tok_s",
    "decode_ratio",
}
DESCENDING |= {"finished_at"}


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


def number(value: Any, form: str) -> str:
    return "" if value is None or value == "" else form.format(float(value))


def megabytes(row: Row) -> str:
    return "" if row.get("size_bytes") is None else f"{float(row['size_bytes']) / 1e6:.2f}"


def accuracy(row: Row) -> str:
    """`41.0 [32.1, 50.6]`, per cent with the Wilson interval."""
    if row.get("ex") is None:
        return ""
    interval = ""
    if row.get("ex_low") is not None and row.get("ex_high") is not None:
        interval = f" [{100 * float(row['ex_low']):.1f}, {100 * float(row['ex_high']):.1f}]"
    return f"{100 * float(row['ex']):.1f}{interval}"


def speed(row: Row) -> str:
    """Decoded tokens a second, with a `~` where other processes disturbed the measurement."""
    return number(row.get("decode_tok_s"), "{:.0f}") + (" ~" if row.get("disturbed") in (1, "1") else "")


def flipped(row: Row) -> str:
    return "" if row.get("lost") is None else f"-{row['lost']} +{row['gained']}"


# Title, how a row's cell is written, and whether it is a number. The whole row is in leaderboard.csv.
SHOWN: Sequence[Column] = (
    ("recipe", recipe_name, False),
    ("model", lambda row: str(row.get("model") or ""), False),
    ("bits/w", lambda row: number(row.get("bits_per_weight"), "{:.2f}"), True),
    ("MB", megabytes, True),
    ("ppl", lambda row: number(row.get("ppl"), "{:.3f}"), True),
    ("ratio", lambda row: number(row.get("ppl_ratio"), "{:.3f}"), True),
    ("KL", lambda row: number(row.get("kl_mean"), "{:.4f}"), True),
    (
        "top-1 %",
        lambda row: number(row.get("top1_agreement") and 100 * float(row["top1_agreement"]), "{:.1f}"),
        True,
    ),
    ("EX % [95 %]", accuracy, True),
    ("=", lambda row: "=" if row.get("tie_group") else "", False),
    ("lost/gained", flipped, True),
    ("tok/s", speed, True),
    ("× base", lambda row: number(row.get("decode_ratio"), "{:.2f}"), True),
    (
        "RAM MB",
        lambda row: number(row.get("memory_bytes") and float(row["memory_bytes"]) / 1e6, "{:.1f}"),
        True,
    ),
    ("work s", lambda row: number(row.get("work_seconds"), "{:.1f}"), True),
)


def conditions(rows: Sequence[Row]) -> list[str]:
    """What the numbers were measured on: a line for each text or set of questions, where rows have one."""
    found = []
    for title, columns in (("ppl", ("ppl_text", "ppl_protocol")), ("KL", ("kl_text",)), ("EX", ("ex_data",))):
        said = {", ".join(str(row[c]) for c in columns if row.get(c)) for row in rows} - {""}
        if said:
            found.append(f"{title} on {' | '.join(sorted(said))}")
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
        print("= cannot be told from the best row by an exact paired McNemar test at 5 %")
    for line in conditions(rows):
        print(line)
    if any(speed(row).endswith("~") for row in rows):
        print("~ speed was disturbed: other processes took processor time; measure again on a quiet machine")
