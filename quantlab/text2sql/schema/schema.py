"""The tables of a question: what DDL says of them, and a SQLite database made from it.

`ddl.read_schema` reads DDL of SQLite, MySQL and PostgreSQL flavour; what comes out is one `Schema`, whatever the text
looked like. `create_sql` writes SQLite DDL from that schema alone: every name in it is quoted, every type is
one of SQLite's, every CHECK was printed from a syntax tree, so nothing of the original text reaches SQLite.

Types. A schema read as SQLite keeps the affinity that SQLite itself gives the declared type (DECIMAL(4,1) and DATE are
NUMERIC, a column without a type has none), so a query behaves as on a database made from the DDL itself. MySQL's and
PostgreSQL's types become the nearest storage class: decimals REAL, dates and times TEXT, booleans INTEGER.

Not covered: defaults, computed columns' expressions, views, triggers, partitions, collations. A foreign key whose
parent columns are neither the primary key nor UNIQUE stays in the `Schema`, but not in `create_sql`: SQLite would
refuse every row of its table.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantlab.errors import DataError

Kind = Literal["integer", "real", "text", "date", "datetime", "time", "boolean", "blob"]
DIALECTS = ("sqlite", "mysql", "postgres")


class SchemaError(DataError):
    """DDL that cannot be read; the message names the statement and the reason."""


@dataclass(frozen=True)
class Column:
    """`declared` is the type as written, empty when there is none (`kind` is then "text", and means little)."""

    name: str
    kind: Kind
    declared: str
    not_null: bool = False  # also for primary key columns
    unique: bool = False  # alone: UNIQUE, or the only column of the primary key
    choices: tuple[Any, ...] | None = None  # ENUM(...), or CHECK (column IN (...)); the members of a SET
    low: float | str | None = None  # inclusive bounds out of simple CHECKs and UNSIGNED; dates as text
    high: float | str | None = None
    length: int | None = None  # of VARCHAR(n) and CHAR(n)
    generated: bool = False  # AUTO_INCREMENT, SERIAL, IDENTITY, AUTOINCREMENT


@dataclass(frozen=True)
class ForeignKey:
    """`table` and `references` as the parent table's own DDL writes them."""

    columns: tuple[str, ...]
    table: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Column names in the keys are spelt as in `columns`. `uniques` leaves the primary key out."""

    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    uniques: tuple[tuple[str, ...], ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()  # only those whose table is in the schema
    checks: tuple[str, ...] = ()  # SQLite expressions; those that Column holds too

    def column(self, name: str) -> Column | None:
        """The column of that name, upper and lower case alike."""
        lower = name.lower()
        return next((column for column in self.columns if column.name.lower() == lower), None)

    def is_key(self, columns: tuple[str, ...]) -> bool:
        """Whether no two rows agree on `columns`, by primary key or UNIQUE on exactly these."""
        wanted = {name.lower() for name in columns}
        keys = [self.primary_key, *self.uniques]
        return any(wanted == {name.lower() for name in key} for key in keys if key)


@dataclass(frozen=True)
class Schema:
    """`tables`: lower-case name → table, in the order of the DDL. `notes`: what was left out of it, and why.

    `dialect` is the one that read the DDL. Left to guess, it is no more than a guess about the dialect of queries.
    """

    tables: Mapping[str, Table] = field(hash=False)
    dialect: str
    notes: tuple[str, ...] = ()
    views: tuple[str, ...] = ()  # names of views and of tables made from a query, whose columns are not known

    def table(self, name: str) -> Table | None:
        """The table of that name, upper and lower case alike."""
        return self.tables.get(name.lower())

    def create_sql(self) -> str:
        """SQLite DDL for these tables, a statement each."""
        return "\n".join(_create_table(table, self) for table in self.tables.values())


def create_database(schema: Schema, connection: sqlite3.Connection) -> None:
    """Make the schema's tables, empty, in `connection`. SchemaError where SQLite refuses one."""
    for table in schema.tables.values():
        try:
            connection.execute(_create_table(table, schema))
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise SchemaError(f"SQLite does not make the table {shorten(table.name)}: {error}") from error


def quote_name(name: str) -> str:
    """The name as a SQLite identifier, whatever characters are in it."""
    return '"' + name.replace('"', '""') + '"'


def shorten(text: str, limit: int = 60) -> str:
    """For messages: one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def affinity(declared: str) -> str:
    """SQLite's column affinity for a declared type (section 3.1 of its "Datatypes in SQLite"); "" for BLOB's."""
    upper = declared.upper()
    if "INT" in upper:
        return "INTEGER"
    if any(part in upper for part in ("CHAR", "CLOB", "TEXT")):
        return "TEXT"
    if "BLOB" in upper or not upper:
        return ""
    if any(part in upper for part in ("REAL", "FLOA", "DOUB")):
        return "REAL"
    return "NUMERIC"


_STORAGE: dict[Kind, str] = {
    "integer": "INTEGER", "real": "REAL", "text": "TEXT", "date": "TEXT", "datetime": "TEXT", "time": "TEXT",
    "boolean": "INTEGER", "blob": "BLOB",
}  # fmt: skip


def _create_table(table: Table, schema: Schema) -> str:
    lines = []
    for column in table.columns:
        storage = affinity(column.declared) if schema.dialect == "sqlite" else _STORAGE[column.kind]
        words = [quote_name(column.name), storage, "NOT NULL" if column.not_null else ""]
        lines.append(" ".join(word for word in words if word))
    if table.primary_key:
        lines.append(f"PRIMARY KEY {_names(table.primary_key)}")
    lines += [f"UNIQUE {_names(columns)}" for columns in table.uniques]
    lines += [f"CHECK ({check})" for check in table.checks]
    for key in table.foreign_keys:
        parent = schema.table(key.table)
        if parent is not None and parent.is_key(key.references):
            target = f"{quote_name(key.table)} {_names(key.references)}"
            lines.append(f"FOREIGN KEY {_names(key.columns)} REFERENCES {target}")
    body = ",\n  ".join(lines)
    return f"CREATE TABLE {quote_name(table.name)} (\n  {body}\n);"


def _names(columns: tuple[str, ...]) -> str:
    return "(" + ", ".join(quote_name(name) for name in columns) + ")"
