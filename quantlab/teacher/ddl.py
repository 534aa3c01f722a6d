"""Reading DDL: which tables there are, and their columns.

Read by sqlglot as SQLite, else as MySQL, else as PostgreSQL. Views and tables made from a query are known by name only.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

DIALECTS = ("sqlite", "mysql", "postgres")
MAX_DDL = 500_000  # characters

Columns = dict[str, str] | None  # lower case → as written; None: not known


@dataclass(frozen=True)
class Schema:
    """Tables of some DDL: lower-case name → (name as written, its columns)."""

    tables: dict[str, tuple[str, Columns]]


@functools.lru_cache(maxsize=4096)
def read_schema(ddl: str) -> Schema | None:
    """The tables of `ddl`, or None where no dialect reads it or it defines no table."""
    if len(ddl) > MAX_DDL:
        return None
    for dialect in DIALECTS:
        try:
            with quiet_sqlglot():
                trees = [tree for tree in sqlglot.parse(ddl, read=dialect) if tree is not None]
        except (SqlglotError, RecursionError, ValueError):
            continue
        tables = _tables(trees)
        if tables:
            return Schema(tables)
    return None


@contextmanager
def quiet_sqlglot() -> Iterator[None]:
    """sqlglot logs a warning for each statement that it keeps as text; the rules say so themselves."""
    logger = logging.getLogger("sqlglot")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tables(trees: Sequence[exp.Expression]) -> dict[str, tuple[str, Columns]]:
    tables: dict[str, tuple[str, Columns]] = {}
    for tree in trees:
        if isinstance(tree, exp.Create) and tree.args.get("kind") in ("TABLE", "VIEW"):
            table = tree.this.find(exp.Table)
            if table is None:
                continue
            definitions = tree.this.expressions if isinstance(tree.this, exp.Schema) else []
            names = [part.name for part in definitions if isinstance(part, exp.ColumnDef | exp.Identifier)]
            tables[table.name.lower()] = (table.name, {name.lower(): name for name in names} or None)
        elif isinstance(tree, exp.Alter) and isinstance(tree.this, exp.Table):
            _, columns = tables.get(tree.this.name.lower(), ("", None))
            for action in tree.args.get("actions") or []:
                if columns is not None and isinstance(action, exp.ColumnDef):
                    columns[action.name.lower()] = action.name
    return tables
