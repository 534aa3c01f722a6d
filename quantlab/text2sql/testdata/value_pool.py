"""What rows are made of: the values in stock for each column, the profile of a database, and tables as they fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlab.text2sql.schema.schema import Table
from quantlab.text2sql.testdata.query_facts import Key

TableRows = tuple[str, tuple[str, ...], list[list[Any]]]  # name, columns, rows


@dataclass(frozen=True)
class Profile:
    """`rows` of a table about; `good` and `near` shares of rows (the rest is random); `plain` how many plain values a
    column uses (few: many ties); `nulls` share of NULL in nullable columns; `runs` groups of exact sizes."""

    rows: int
    good: float
    near: float
    plain: int
    nulls: float
    runs: bool = True


@dataclass
class Stock:
    """Values by column. `near`, `plain`: see `values.pool`. `meets`: condition → the values that meet it."""

    kinds: dict[Key, str]
    near: dict[Key, list[Any]]
    plain: dict[Key, list[Any]]
    meets: dict[Key, list[list[Any]]] = field(default_factory=dict)
    linked: dict[Key, list[Key]] = field(default_factory=dict)
    grouped: frozenset[Key] = frozenset()
    sizes: tuple[int, ...] = ()
    extremes: frozenset[Key] = frozenset()  # the largest or smallest of these decides
    distances: tuple[tuple[Key, Key, int], ...] = ()  # see `clues.Clues`


@dataclass
class Filled:
    """A table and its rows so far; `good`: numbers of the rows that meet all conditions."""

    table: Table
    rows: list[list[Any]] = field(default_factory=list)
    good: list[int] = field(default_factory=list)

    def values(self, columns: Sequence[str], row: int) -> list[Any]:
        names = [c.name.lower() for c in self.table.columns]
        return [self.rows[row][names.index(column.lower())] for column in columns]

    def column(self, name: str, *, good: bool = False) -> list[Any]:
        """The values of a column, without NULL; of good rows alone, where there are any."""
        at = [c.name.lower() for c in self.table.columns].index(name.lower())
        rows = [self.rows[number] for number in self.good] if good and self.good else self.rows
        return [row[at] for row in rows if row[at] is not None]


def in_order(tables: Sequence[Table]) -> list[Table]:
    """Parents before children; a cycle is cut at the table named first."""
    names = {table.name.lower(): table for table in tables}
    done: dict[str, Table] = {}
    waiting: set[str] = set()

    def visit(table: Table) -> None:
        name = table.name.lower()
        if name in done or name in waiting:
            return
        waiting.add(name)
        for key in table.foreign_keys:
            parent = names.get(key.table.lower())
            if parent is not None:
                visit(parent)
        done[name] = table

    for table in tables:
        visit(table)
    return list(done.values())
