"""Tables as written to tables as they are: names in keys looked up, foreign keys completed, SQLite asked.

A key that names a column which is not there is left out, and so is a foreign key to a table which is not there, each
with a note: datasets cut single tables out of their schema.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping, Sequence

from quantlab.text2sql.schema.checks import Bound, Check, read_check
from quantlab.text2sql.schema.columns import RawColumn, RawKey, RawTable
from quantlab.text2sql.schema.schema import (
    Column,
    ForeignKey,
    Schema,
    Table,
    create_database,
    quote_name,
    shorten,
)


def finish(raw: Sequence[RawTable], dialect: str, notes: list[str]) -> Schema:
    """The schema of these tables; `notes` grows. SchemaError where SQLite cannot hold a table."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        tables = {table.name.lower(): _table(table, dialect, notes, connection) for table in raw}
        by_name = {table.name.lower(): table for table in raw}
        for key, table in tables.items():
            foreign = _foreign_keys(by_name[key], tables, notes)
            tables[key] = Table(
                table.name, table.columns, table.primary_key, table.uniques, foreign, table.checks
            )
        schema = Schema(tables, dialect, tuple(notes))
        create_database(schema, connection)
    return schema


def _table(raw: RawTable, dialect: str, notes: list[str], connection: sqlite3.Connection) -> Table:
    where = shorten(raw.name, 40)
    primary_key = _spelt(raw, raw.primary_key, f"primary key of {where}", notes)
    uniques: list[tuple[str, ...]] = []
    for names in raw.uniques:
        unique = _spelt(raw, names, f"UNIQUE of {where}", notes)
        if unique and set(unique) != set(primary_key) and unique not in uniques:
            uniques.append(unique)
    checks = []
    for text in raw.checks:
        check = read_check(text, raw, dialect)
        reason = check.reason or _refused(check.sql, raw, connection)
        if reason:
            notes.append(f"CHECK ({shorten(text, 40)}) of {where}: left out, {shorten(reason, 80)}")
        else:
            checks.append(check)
    columns = []
    for column in raw.columns:
        checks += _type_checks(column)
        columns.append(_column(column, primary_key, uniques, checks))
    texts = tuple(dict.fromkeys(check.sql for check in checks))
    return Table(raw.name, tuple(columns), primary_key, tuple(uniques), (), texts)


def _column(
    raw: RawColumn, primary_key: tuple[str, ...], uniques: list[tuple[str, ...]], checks: list[Check]
) -> Column:
    mine = [bound for check in checks for bound in check.bounds if bound.column == raw.name]
    lows = [bound.low for bound in mine if bound.low is not None]
    highs = [bound.high for bound in mine if bound.high is not None]
    choices = [bound.choices for bound in mine if bound.choices is not None]
    if choices:
        allowed: tuple[object, ...] | None = tuple(
            value for value in choices[0] if all(value in other for other in choices[1:])
        )
    else:
        allowed = raw.type.choices
    return Column(
        name=raw.name,
        kind=raw.type.kind,
        declared=raw.type.declared,
        not_null=raw.not_null or raw.name in primary_key,
        unique=(raw.name,) in (primary_key, *uniques),
        choices=allowed or None,
        low=max(lows, key=_sort_key) if lows else None,
        high=min(highs, key=_sort_key) if highs else None,
        length=raw.type.length,
        generated=raw.generated,
    )


def _sort_key(value: float | str) -> tuple[bool, float, str]:
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")


def _type_checks(column: RawColumn) -> list[Check]:
    """What a type alone forbids: other values than an ENUM's, numbers below zero."""
    name = quote_name(column.name)
    if column.type.choices and not column.type.is_set:
        values = ", ".join("'" + value.replace("'", "''") + "'" for value in column.type.choices)
        return [Check(f"{name} IN ({values})", (), "")]
    if column.type.unsigned:
        return [Check(f"{name} >= 0", (Bound(column.name, low=0),), "")]
    return []


def _refused(check: str, raw: RawTable, connection: sqlite3.Connection) -> str:
    """Why SQLite does not take this CHECK; empty where it does."""
    columns = ", ".join(quote_name(column.name) for column in raw.columns)
    try:
        connection.execute(f"CREATE TEMP TABLE probe ({columns}, CHECK ({check}))")
        connection.execute("DROP TABLE temp.probe")
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return str(error)
    return ""


def _spelt(raw: RawTable, names: Sequence[str], what: str, notes: list[str]) -> tuple[str, ...]:
    """Column names as the table spells them, each once; none, and a note, where one of them is no column."""
    spelt = []
    for name in names:
        column = raw.column(name)
        if column is None:
            notes.append(f"{what}: left out, there is no column {shorten(name, 40)}")
            return ()
        spelt.append(column.name)
    return tuple(dict.fromkeys(spelt))


def _foreign_keys(raw: RawTable, tables: Mapping[str, Table], notes: list[str]) -> tuple[ForeignKey, ...]:
    found: list[ForeignKey] = []
    for key in raw.foreign_keys:
        what = f"foreign key of {shorten(raw.name, 40)} to {shorten(key.table, 40)}"
        columns = _spelt(raw, key.columns, what, notes)
        parent = tables.get(key.table.lower())
        if parent is None:
            notes.append(f"{what}: {shorten(key.table, 40)} is not in the DDL")
            continue
        references = _referenced(key, parent, what, notes)
        if columns and references and len(columns) == len(references):
            if not parent.is_key(references):
                notes.append(
                    f"{what}: SQLite will not check it, {', '.join(references)} need not be unique there"
                )
            complete = ForeignKey(columns, parent.name, references)
            if complete not in found:
                found.append(complete)
        elif columns and references:
            notes.append(f"{what}: left out, {len(columns)} columns for {len(references)}")
    return tuple(found)


def _referenced(key: RawKey, parent: Table, what: str, notes: list[str]) -> tuple[str, ...]:
    if not key.references:
        if not parent.primary_key:
            notes.append(f"{what}: left out, it names no columns and the table has no primary key")
        return parent.primary_key
    spelt = []
    for name in key.references:
        column = parent.column(name)
        if column is None:
            notes.append(f"{what}: left out, there is no column {shorten(name, 40)}")
            return ()
        spelt.append(column.name)
    return tuple(spelt)
