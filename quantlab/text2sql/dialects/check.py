"""The last look at a translation: nothing is left in it that SQLite does not have."""

from __future__ import annotations

import contextlib
import functools
import re
import sqlite3

from sqlglot import exp

from quantlab.text2sql.dialects.fields import DIFFERENCE
from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    Context,
    Untranslatable,
    bare,
    kind_of,
    moment_of,
    string_of,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What SQLite calls keywords and does not take for names (those that it falls back from are left out).
_RESERVED = _words(
    """ADD ALL ALTER AND AS AUTOINCREMENT BETWEEN CASE CHECK COLLATE COMMIT CONSTRAINT CREATE DEFAULT DEFERRABLE DELETE
    DISTINCT DROP ELSE ESCAPE EXISTS FOREIGN FROM GROUP HAVING IN INDEX INSERT INTERSECT INTO IS ISNULL JOIN LIMIT NOT
    NOTHING NOTNULL NULL ON OR ORDER PRIMARY REFERENCES RETURNING SELECT SET TABLE THEN TO TRANSACTION UNION UNIQUE
    UPDATE USING VALUES WHEN WHERE"""
)
_FUNCTIONS = _words(
    """ABS AVG COALESCE COUNT CUME_DIST DATE DATETIME DENSE_RANK FIRST_VALUE GROUP_CONCAT INSTR JULIANDAY LAG LAST_VALUE
    LEAD LENGTH LOWER LTRIM MAX MIN NTH_VALUE NTILE NULLIF PERCENT_RANK RANK REPLACE ROUND ROW_NUMBER RTRIM SIGN
    STRFTIME SUBSTR SUM TIME TRIM UPPER"""
)
_MATHEMATICS = _words("ACOS ASIN ATAN ATAN2 COS DEGREES EXP LN LOG LOG10 LOG2 PI POWER RADIANS SIN SQRT TAN")
_ALLOWED: tuple[type[exp.Expression], ...] = (
    exp.Select, exp.SetOperation, exp.Subquery, exp.Values, exp.With, exp.CTE, exp.From, exp.Join, exp.Where, exp.Group,
    exp.Having, exp.Order, exp.Ordered, exp.Limit, exp.Offset, exp.Distinct, exp.Window, exp.WindowSpec, exp.Filter,
    exp.Table, exp.TableAlias, exp.Column, exp.Identifier, exp.Star, exp.Alias, exp.Literal, exp.Null, exp.Boolean,
    exp.Paren, exp.Tuple, exp.And, exp.Or, exp.Not, exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Is, exp.In,
    exp.Between, exp.Like, exp.Glob, exp.Escape, exp.Exists, exp.Case, exp.If, exp.Add, exp.Sub, exp.Mul, exp.Div,
    exp.Mod, exp.Neg, exp.BitwiseAnd, exp.BitwiseOr, exp.BitwiseNot, exp.BitwiseLeftShift,
    exp.BitwiseRightShift, exp.DPipe,
    exp.Cast, exp.DataType, exp.Anonymous, exp.Collate, exp.Var,
)  # fmt: skip
# The parts of these that SQLite has, and those that can go without changing the result.
_PARTS: dict[type[exp.Expression], tuple[str, str]] = {
    exp.Select: (
        "with_ expressions distinct from_ joins where group having order limit offset windows",
        "locks hint operation_modifiers",
    ),
    exp.Table: ("this alias joins", "db catalog hints"),
    exp.Join: ("this side kind method on using", ""),
    exp.Group: ("expressions", ""),
    exp.Distinct: ("expressions", ""),
    exp.TableAlias: ("this columns", ""),
    exp.Subquery: ("this alias with_ order limit offset", ""),
    exp.SetOperation: ("this expression distinct with_ order limit offset", "by_name side kind"),
    exp.Values: ("expressions alias", ""),
    exp.CTE: ("this alias materialized", ""),
    exp.Window: ("this partition_by order spec over alias", ""),
    exp.Limit: ("expression", ""),
    exp.Ordered: ("this desc nulls_first", ""),
    exp.In: ("this expressions query", ""),
}
_CATALOGUES = frozenset({"information_schema", "pg_catalog", "mysql", "sys", "performance_schema"})
_NAMES = {
    "JSONExtract": "the operator ->", "JSONExtractScalar": "the operator ->>", "Lateral": "LATERAL", "Unnest": "UNNEST",
    "Interval": "an INTERVAL outside dates", "Array": "an array", "Bracket": "an element of an array",
    "Parameter": "a variable", "Placeholder": "a parameter", "HexString": "a string of bytes",
    "MatchAgainst": "MATCH … AGAINST", "BitwiseXor": "the operator for exclusive or of bits",
    "Rollup": "GROUP BY … ROLLUP", "Cube": "GROUP BY … CUBE",
}  # fmt: skip


def settle_names(tree: exp.Expression) -> None:
    """Schema names before tables go; names that SQLite would take for keywords get quotes, plain ones lose them."""
    for table in tree.find_all(exp.Table):
        if table.db.lower() in _CATALOGUES:
            raise Untranslatable(f"the catalogue {table.db} has no counterpart in SQLite")
        table.set("db", None)
        table.set("catalog", None)
    for column in tree.find_all(exp.Column):
        column.set("db", None)
        column.set("catalog", None)
    for identifier in tree.find_all(exp.Identifier):
        plain = re.fullmatch(r"[A-Za-z_]\w*", identifier.name) is not None
        if not identifier.name or "\0" in identifier.name:
            raise Untranslatable("an empty name has no counterpart in SQLite")
        identifier.set(
            "quoted", not plain or identifier.name.upper() in _RESERVED or identifier.args.get("quoted")
        )


def check(tree: exp.Expression, context: Context) -> None:
    """Untranslatable, with the construct's name, where anything is left that SQLite does not have.

    Parts that change nothing (index hints, FOR UPDATE) are taken out; parentheses are put where precedences differ.
    """
    if not isinstance(tree, exp.Query) or isinstance(tree, exp.Subquery):
        raise Untranslatable(f"{_name(tree)} is not a query")
    for node in tree.walk():
        if isinstance(node, exp.Anonymous):
            _check_function(node, context)
        if not isinstance(node, _ALLOWED) or (
            isinstance(node, exp.Var) and not isinstance(node.parent, exp.Collate)
        ):
            raise Untranslatable(
                f"{_NAMES.get(type(node).__name__, _name(node))} has no counterpart in SQLite"
            )
        _check_parts(node)
        if isinstance(node, exp.Join):
            _check_join(node)
        if isinstance(node, exp.Table):
            if not isinstance(node.this, exp.Identifier):
                raise Untranslatable("a function instead of a table has no counterpart in SQLite")
            if node.args.get("alias") and node.args["alias"].args.get("columns"):
                raise Untranslatable("names for the columns of a table's alias have no counterpart in SQLite")
    for node in list(tree.walk()):
        _guard_precedence(node)


def _check_parts(node: exp.Expression) -> None:
    for kind, (kept, dropped) in _PARTS.items():
        if isinstance(node, kind):
            for part in given(node):
                if part in dropped.split():
                    node.set(part, None)
                elif part not in kept.split():
                    raise Untranslatable(f"{_part_words(node, part)} has no counterpart in SQLite")


def _check_join(node: exp.Join) -> None:
    if node.side in ("RIGHT", "FULL") and sqlite3.sqlite_version_info < (3, 39):
        raise Untranslatable(f"{node.side} JOIN needs SQLite 3.39")
    if node.kind not in ("", "INNER", "OUTER", "CROSS"):
        raise Untranslatable(f"{node.kind} JOIN has no counterpart in SQLite")


def _check_function(node: exp.Anonymous, context: Context) -> None:
    name = node.name.upper()
    if name == DIFFERENCE:
        raise Untranslatable("the difference of two timestamps, an interval, has no counterpart in SQLite")
    if name in _MATHEMATICS and name.lower() not in _available():
        raise Untranslatable(f"the function {name} is not in this SQLite")
    if name not in _FUNCTIONS | _MATHEMATICS:
        raise Untranslatable(f"the function {name} has no counterpart in SQLite")
    at = {"STRFTIME": 1, "DATE": 0, "DATETIME": 0, "TIME": 0, "JULIANDAY": 0}.get(name)
    if at is not None and "unixepoch" not in map(string_of, node.expressions):
        _check_moment(node.expressions[at], context)


def _check_moment(value: exp.Expression, context: Context) -> None:
    """SQLite reads numbers as days since 4714 BC, and 'now'; the other databases read neither like that."""
    literal = bare(value)
    is_time = re.fullmatch(r"\d\d:\d\d(:\d\d)?", string_of(literal) or "") is not None
    is_constant = isinstance(literal, exp.Literal | exp.Neg | exp.Boolean)
    if is_constant and not is_time and moment_of(literal) is None:
        raise Untranslatable(f"SQLite cannot read {literal.sql()} as a date or a time")
    if kind_of(value, context) in NUMBERS | {"boolean"}:
        raise Untranslatable("a part of a date taken from a number has no counterpart in SQLite")


@functools.lru_cache(maxsize=1)
def _available() -> frozenset[str]:
    """The functions of the SQLite at hand; some builds leave mathematics out."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection, contextlib.suppress(sqlite3.Error):
        return frozenset(str(name) for (name,) in connection.execute("SELECT name FROM pragma_function_list"))
    return frozenset()  # before SQLite 3.30, which lists no functions


def given(node: exp.Expression) -> list[str]:
    """The arguments of a node that say something."""
    return [part for part, value in node.args.items() if value not in (None, False, [], "")]


def _name(node: exp.Expression) -> str:
    """A node's class in words: AtTimeZone → AT TIME ZONE."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).upper()


def _part_words(node: exp.Expression, part: str) -> str:
    if isinstance(node, exp.Group):
        return f"GROUP BY … {part.upper().replace('_', ' ')}"
    return f"{_name(node)} with {part.strip('_').upper().replace('_', ' ')}"


_ARITHMETIC = (exp.Add, exp.Sub, exp.Mul, exp.Div)
_COMPARISONS = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Is, exp.Like, exp.Glob)


def _guard_precedence(node: exp.Expression) -> None:
    """Parentheses around operands that are operators: the dialects disagree on which binds tighter."""
    if not isinstance(node, exp.Binary) or isinstance(node, exp.Connector | exp.Escape):
        return
    for side in ("this", "expression"):
        operand = node.args.get(side)
        if not isinstance(operand, exp.Binary | exp.Not | exp.Between | exp.In | exp.Escape):
            continue
        agreed = (
            (isinstance(node, _ARITHMETIC) and isinstance(operand, _ARITHMETIC))
            or (isinstance(node, _COMPARISONS) and isinstance(operand, (*_ARITHMETIC, exp.Mod, exp.DPipe)))
            or (isinstance(node, exp.DPipe) and isinstance(operand, exp.DPipe) and side == "this")
        )
        if not agreed:
            node.set(side, exp.Paren(this=operand.copy()))
