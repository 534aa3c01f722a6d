"""Cells of tables and cards: how the columns of the leaderboard are written.

A cell is made from the whole row of a run. Columns of tasks say themselves how (``quantlab.registry.tasks.Column``);
the functions here are those that they name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantlab.registry import load
from quantlab.registry.tasks import Column

Row = Mapping[str, Any]


def number(value: Any, form: str, scale: float = 1.0) -> str:
    return "" if value is None or value == "" else form.format(scale * float(value))


def accuracy(row: Row) -> str:
    """`41.0 [32.1, 50.6]`, per cent with the Wilson interval."""
    if row.get("ex") is None:
        return ""
    interval = ""
    if row.get("ex_low") is not None and row.get("ex_high") is not None:
        interval = f" [{100 * float(row['ex_low']):.1f}, {100 * float(row['ex_high']):.1f}]"
    return f"{100 * float(row['ex']):.1f}{interval}"


def divergence(row: Row, interval: str = "") -> str:
    """`0.0123`, in nats; `noise` behind what the original has against itself too."""
    kl, noise = row.get("kl_mean"), row.get("kl_noise")
    if kl is None or kl == "":
        return ""
    below = noise is not None and noise != "" and float(kl) <= float(noise)
    return f"{float(kl):.4f}{interval}" + (" noise" if below else "")


def divergence_interval(row: Row) -> str:
    """The same with its interval: `0.0123 [0.0110, 0.0137]`."""
    low, high = row.get("kl_low"), row.get("kl_high")
    known = low not in (None, "") and high not in (None, "")
    return divergence(row, f" [{float(str(low)):.4f}, {float(str(high)):.4f}]" if known else "")


def speed(row: Row) -> str:
    """Decoded tokens per second, with a `~` where other processes disturbed the measurement."""
    return number(row.get("decode_tok_s"), "{:.0f}") + (" ~" if row.get("disturbed") in (1, "1") else "")


def flipped(row: Row) -> str:
    """`-3 +1`: items lost and gained."""
    return "" if row.get("lost") is None else f"-{row['lost']} +{row['gained']}"


def tied(row: Row) -> str:
    return "=" if row.get("tie_group") else ""


def cell_of(column: Column, card: bool = False) -> Callable[[Row], str]:
    """How the cell of a column is written, in a table or in a card."""
    if written := (card and column.card_written) or column.written:
        found: Callable[[Row], str] = load(written)
        return found
    return lambda row: number(row.get(column.name), column.form, column.scale)


def conditions_of(column: Column, row: Row) -> list[str]:
    """What a column of a row was measured on: text and protocol, or questions."""
    return [str(row[name]) for name in column.on if row.get(name)]
