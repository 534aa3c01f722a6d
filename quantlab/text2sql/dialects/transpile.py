"""Queries of MySQL and PostgreSQL as SQLite queries that give the same result, or a reason why there is none.

sqlglot parses; functions come out of its parser as they are written, and what each means is decided here and in
`dialects/`, one by one: sqlglot's own translations are made for reading and are wrong for SQLite in places (month ends,
NULLs in CONCAT, weeks). Whatever has no rule is refused by name, and what comes out is looked through once more: only
nodes and functions that SQLite really has, and text that SQLite's own parser takes.

Decisions:
- The clock stands still at `CLOCK`, in every dialect (`clock.py` for SQLite itself).
- Text compares by case, as SQLite does by default: MySQL's usual collations would find 'Kim' = 'KIM', in GROUP BY too.
  LIKE, REGEXP and INSTR follow their dialect (of ASCII letters MySQL ignores the case, PostgreSQL does not).
- Decimals are binary fractions: no scale is kept ('1.50' is '1.5' as text), no quotient is cut to MySQL's four more
  digits.
- Names in quotes are written in backticks: SQLite takes an unknown name in double quotes for a string.
- NULLs sort as in the dialect the query is written in.
- What MySQL or PostgreSQL would reject when it runs (a column that is not grouped by, a division by zero) SQLite may
  run.
- Schema names before tables are dropped, but for the databases' own catalogues.

SQLite queries come back as they are, but for the clock. Types of columns are not known without a schema: a difference
of two columns is one of dates if their names look like it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from quantlab.text2sql.dialects.check import check, given, settle_names
from quantlab.text2sql.dialects.clock import CLOCK, fix_clock
from quantlab.text2sql.dialects.nodes import Context, Untranslatable
from quantlab.text2sql.dialects.operators import HANDLERS
from quantlab.text2sql.dialects.readers import READERS, write
from quantlab.text2sql.dialects.structure import settle_structure
from quantlab.text2sql.schema.schema import Column, Schema
from quantlab.text2sql.sqlglot_log import quiet_sqlglot

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`")
MAX_LENGTH = 20_000  # characters
MAX_NODES = 5000  # of the tree that takes the place of one node
MAX_DEPTH = 60  # parentheses inside parentheses

__all__ = ["CLOCK", "Translation", "to_sqlite"]


@dataclass(frozen=True)
class Translation:
    """`sql` is for SQLite, and empty where there is none: `reason` says why. `changed`: it is not the text given."""

    sql: str
    reason: str = ""
    changed: bool = False


def to_sqlite(
    sql: str, dialect: str = "sqlite", clock: str = CLOCK, schema: Schema | None = None
) -> Translation:
    """The query for SQLite. Never raises.

    `dialect`: "sqlite", "mysql" or "postgres". `clock`: "YYYY-MM-DD HH:MM:SS". A `schema` tells the types of columns,
    which settles what a difference of two columns is, and how their dates compare.
    """
    if dialect == "sqlite":
        fixed = fix_clock(sql, clock)
        return Translation(fixed, changed=fixed != sql)
    if dialect not in READERS:
        return Translation("", f"no dialect {dialect!r}: there are sqlite, {', '.join(READERS)}")
    return _translated(sql, dialect, clock, schema)


@functools.lru_cache(maxsize=4096)
def _translated(sql: str, dialect: str, clock: str, schema: Schema | None) -> Translation:
    try:
        moment = datetime.datetime.strptime(clock, "%Y-%m-%d %H:%M:%S")
        with quiet_sqlglot():
            tree = _parse(sql, dialect)
            context = Context(dialect, moment, _column_kinds(schema, tree), schema is not None)
            tree = settle_structure(translate(tree, context))
            settle_names(tree)
            check(tree, context)
            written = write(tree)
        _try(written)
    except Untranslatable as error:
        return Translation("", str(error))
    except SqlglotError as error:
        return Translation("", f"not {dialect}: {str(error).splitlines()[0][:200]}")
    except (RecursionError, MemoryError):
        return Translation("", "the query is nested too deeply")
    except Exception as error:  # sqlglot's parser raises whatever it trips over
        return Translation("", f"not {dialect}: {type(error).__name__}: {str(error)[:200]}")
    return Translation(written, changed=written != sql)


def _parse(sql: str, dialect: str) -> exp.Expression:
    """The one query in the text."""
    if len(sql) > MAX_LENGTH:
        raise Untranslatable(f"the query is longer than {MAX_LENGTH} characters")
    if "\0" in sql:
        raise Untranslatable("the query holds a NUL character")
    reader = READERS[dialect]
    depth = deepest = 0
    for token in sqlglot.tokenize(sql, read=reader):
        depth += (token.text == "(") - (token.text == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise Untranslatable("the query is nested too deeply")
    # Two things that sqlglot reads as something else, without a word.
    if re.search(r"\bINTERVAL\s*'[^']*\bago\s*'", sql, re.IGNORECASE):
        raise Untranslatable("an INTERVAL with 'ago' has no counterpart in SQLite")
    if re.search(r"(?<!\w)\d+_\d", _QUOTED.sub("''", sql)):
        raise Untranslatable("digits joined by _ have no counterpart in SQLite")
    trees = [tree for tree in sqlglot.parse(sql, read=reader) if tree is not None]
    if len(trees) != 1:
        raise Untranslatable("there is no query" if not trees else "there is more than one statement")
    if not isinstance(trees[0], exp.Query):
        raise Untranslatable(f"{type(trees[0]).__name__.upper()} is not a query on the data")
    return trees[0]


def translate(tree: exp.Expression, context: Context) -> exp.Expression:
    """Every node by its handler, the inner ones first; the tree changes in place, its root may be another."""
    for node in reversed(list(tree.walk(bfs=False))):
        handler = HANDLERS.get(type(node))
        if handler is None:
            continue
        new = handler(node, context)
        if new is node:
            continue
        # Arguments that stand in several places, nested, would grow without end.
        if sum(1 for _ in itertools.islice(new.walk(), MAX_NODES)) == MAX_NODES:
            raise Untranslatable("the translation is too long")
        if node.args.get("negate") and not isinstance(node, exp.Like | exp.ILike):
            new = exp.Not(this=exp.Paren(this=new))
        if node is tree:
            tree = new
        else:
            node.replace(new)
    return tree


def expression_to_sqlite(
    text: str, dialect: str, columns: Mapping[str, str], clock: str = CLOCK
) -> exp.Expression:
    """A condition of MySQL or PostgreSQL as the tree of one for SQLite; `columns` are the kinds of the names in it.

    Raises Untranslatable, SqlglotError, ValueError or RecursionError.
    """
    moment = datetime.datetime.strptime(clock, "%Y-%m-%d %H:%M:%S")
    context = Context(dialect, moment, columns, typed=True)
    with quiet_sqlglot():
        tree = translate(_parse(f"SELECT {text}", dialect), context)
        check(tree, context)
    if not isinstance(tree, exp.Select) or len(tree.expressions) != 1 or len(given(tree)) != 1:
        raise Untranslatable("it is not one expression")
    return tree.expressions[0]


def _column_kinds(schema: Schema | None, tree: exp.Expression) -> Mapping[str, str]:
    """Column names of one kind throughout the schema → that kind, names that the query gives itself left out."""
    if schema is None:
        return {}
    kinds: dict[str, set[str]] = {}
    for table in schema.tables.values():
        for column in table.columns:
            kinds.setdefault(column.name.lower(), set()).add(_kind(column))
    for alias in tree.find_all(exp.Alias, exp.TableAlias):
        given = (
            alias.args.get("columns") or [] if isinstance(alias, exp.TableAlias) else [alias.args["alias"]]
        )
        for name in given:
            kinds.pop(name.name.lower(), None)
    return {name: found.copy().pop() for name, found in kinds.items() if len(found) == 1 and "" not in found}


def _kind(column: Column) -> str:
    """A column's kind as `nodes.kind_of` has it; empty where it is not known."""
    if column.kind == "real":
        return "double" if column.declared.lower().startswith(("float", "double", "real")) else "numeric"
    return column.kind if column.declared and column.kind != "blob" else ""


def _try(sql: str) -> None:
    """Untranslatable where SQLite's parser does not take the text. Its tables are not there, which is no error."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute(f"EXPLAIN {sql}").close()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            if not str(error).startswith(("no such table", "no such column")):
                raise Untranslatable(f"SQLite does not take the translation: {error}") from error
