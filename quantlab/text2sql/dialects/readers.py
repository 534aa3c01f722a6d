"""sqlglot's dialects as they are needed here: functions read by name alone, names written in backticks."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlglot import exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.dialects.mysql import MySQL
from sqlglot.dialects.postgres import Postgres
from sqlglot.dialects.sqlite import SQLite

# Functions whose arguments have a syntax of their own; all others are read by name and arguments alone.
_OWN_SYNTAX = frozenset(
    {"CAST", "CONVERT", "EXTRACT", "POSITION", "GROUP_CONCAT", "STRING_AGG", "SUBSTRING", "SUBSTR", "TRIM",
     "MATCH", "OVERLAY", "JSON_OBJECT", "JSON_TABLE"}
)  # fmt: skip


def _own_syntax(parsers: dict[str, Any]) -> dict[str, Any]:
    return {name: parser for name, parser in parsers.items() if name in _OWN_SYNTAX}


class MySQLCalls(MySQL):
    """MySQL, its functions left as they are written."""

    class Parser(MySQL.Parser):
        FUNCTIONS: ClassVar[dict[str, Any]] = {}
        FUNCTION_PARSERS: ClassVar[dict[str, Any]] = _own_syntax(MySQL.Parser.FUNCTION_PARSERS)


class PostgresCalls(Postgres):
    """PostgreSQL, its functions left as they are written."""

    class Parser(Postgres.Parser):
        FUNCTIONS: ClassVar[dict[str, Any]] = {}
        FUNCTION_PARSERS: ClassVar[dict[str, Any]] = _own_syntax(Postgres.Parser.FUNCTION_PARSERS)


class SQLiteNames(SQLite):
    """SQLite with names in backticks: one in double quotes that is no column would be a string."""

    class Tokenizer(SQLite.Tokenizer):
        IDENTIFIERS: ClassVar[list[Any]] = ["`", '"', ("[", "]")]


READERS: dict[str, type[Dialect]] = {"mysql": MySQLCalls, "postgres": PostgresCalls}


def write(tree: exp.Expression) -> str:
    """The query as SQLite text."""
    written: str = tree.sql(dialect=SQLiteNames, comments=False, normalize_functions=False, identify=False)
    return written
