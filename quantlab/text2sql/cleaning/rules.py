"""The rules that rows are cleaned by: each a pure function with a name.

A rule takes a row, and what was found out about it beforehand (its execution, its verdict), and finds None (the row
is kept), a reason (rejected), or `Unchecked` where it cannot tell, which rejects nothing and is counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import sqlglot
from sqlglot import exp
from sqlglot.errors import ParseError, SqlglotError

from quantlab.errors import DataError
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Execution
from quantlab.text2sql.schema.name_check import known_names, unknown_name
from quantlab.text2sql.schema.schema import DIALECTS
from quantlab.text2sql.sqlglot_log import quiet_sqlglot
from quantlab.text2sql.teaching.judge import Verdict

MAX_SQL = 20_000  # characters


@dataclass(frozen=True)
class Unchecked:
    """A rule could not tell, and why; the row is not rejected for it."""

    why: str


Finding = str | Unchecked | None


def parses(item: Item) -> Finding:
    """Whether sqlglot reads the answer in one of the dialects; the reason says where it stopped."""
    found = _read(item.answer)
    if isinstance(found, str):
        return found
    return None if found else "there is no statement"


def select(item: Item) -> Finding:
    """Whether the answer is exactly one query."""
    found = _read(item.answer)
    if isinstance(found, str):
        return "it does not parse"
    if len(found) != 1:
        return f"{len(found) or 'no'} statements where one is expected"
    return _not_a_query(found[0])


def binds(item: Item) -> Finding:
    """Whether every table and column of the answer exists in the DDL; the reason names the nearest."""
    found = _read(item.answer)
    if isinstance(found, str) or len(found) != 1 or _not_a_query(found[0]) is not None:
        return "it is not one query that parses"
    schema = known_names(item.context)
    if schema is None:
        return Unchecked("the DDL cannot be read")
    return unknown_name(found[0], schema)


def executes(item: Item, execution: Execution | None) -> Finding:
    """Whether the answer ran. `execution` is None where there is nothing to run it on."""
    if execution is None:
        return Unchecked("no database, and the DDL or the query has no counterpart in SQLite")
    if execution.kind == "database":
        raise DataError(f"row {item.id}: {execution.reason}", hint="is the file a SQLite database?")
    return None if execution.status == "rows" else execution.reason


def returns(item: Item, execution: Execution | None) -> Finding:
    """Whether a populated database gave at least one value that is not NULL."""
    if item.database is None or execution is None:
        return Unchecked("no populated database")
    if execution.status != "rows":
        return f"it does not run: {execution.reason}"
    if not execution.rows:
        return "it returns no rows"
    return (
        None if any(value is not None for row in execution.rows for value in row) else "it returns only NULL"
    )


def judge(item: Item, verdict: Verdict | None) -> Finding:
    """Whether a judge said yes. A row without a verdict is rejected: nobody vouches for it."""
    if verdict is None:
        return "no verdict"
    return None if verdict.yes else verdict.why or "the judge says no"


RULES: dict[str, Callable[..., Finding]] = {
    "parses": parses,
    "select": select,
    "binds": binds,
    "executes": executes,
    "returns": returns,
    "judge": judge,
}


@lru_cache(maxsize=256)
def _read(sql: str) -> str | list[exp.Expression]:
    """The statements of `sql`, or why it cannot be read. The trees are shared between rules: read only."""
    if len(sql) > MAX_SQL:
        return f"longer than {MAX_SQL} characters"
    if "\x00" in sql:
        return "it contains a NUL character"
    reason = ""
    for dialect in DIALECTS:  # SQLite's first: it says what is wrong
        try:
            with quiet_sqlglot():
                trees = sqlglot.parse(sql, read=dialect)
        except ParseError as error:
            reason = reason or _where(error)
        except SqlglotError as error:
            reason = reason or f"not SQL: {str(error).splitlines()[0][:200]}"
        except RecursionError:
            return "it is nested too deeply"
        except ValueError as error:
            reason = reason or f"not SQL: {error}"
        else:
            return [tree for tree in trees if tree is not None and not isinstance(tree, exp.Semicolon)]
    return reason


def _where(error: ParseError) -> str:
    if not error.errors:
        return f"not SQL: {str(error).splitlines()[0][:200]}"
    first = error.errors[0]
    what = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", str(first.get("description") or "")).rstrip(". ")
    near = str(first.get("highlight") or "").strip()
    beside = f" at {near[:40]!r}" if near else ""
    return f"line {first.get('line')}, column {first.get('col')}: {what}{beside}"


def _not_a_query(tree: exp.Expression) -> str | None:
    inner = tree
    while isinstance(inner, exp.Subquery | exp.Paren):
        inner = inner.this
    if not isinstance(inner, exp.Select | exp.SetOperation):
        word = str(inner.this) if isinstance(inner, exp.Command) else inner.key
        return f"{word.upper()} where a SELECT is expected"
    for node in inner.find_all(exp.Insert, exp.Update, exp.Delete, exp.Into, exp.Create, exp.Command):
        return f"{node.key.upper()} inside the query"
    return None
