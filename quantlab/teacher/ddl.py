"""What names a row's DDL defines, for `binding.py`: its tables with their columns, its views by name only."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from quantlab.sql import schema as sql_schema

Columns = dict[str, str] | None  # lower case → as written; None: not known


@dataclass(frozen=True)
class Schema:
    """Tables of some DDL: lower-case name → (name as written, its columns)."""

    tables: dict[str, tuple[str, Columns]]


@functools.lru_cache(maxsize=4096)
def read_schema(ddl: str) -> Schema | None:
    """The tables of `ddl`, or None where no dialect reads it or it defines no table."""
    try:
        found = sql_schema.read_schema(ddl)
    except sql_schema.SchemaError:
        return None
    tables: dict[str, tuple[str, Columns]] = {name.lower(): (name, None) for name in found.views}
    for key, table in found.tables.items():
        tables[key] = table.name, {column.name.lower(): column.name for column in table.columns}
    return Schema(tables)
