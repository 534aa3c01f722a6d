"""CHECK constraints: a SQLite expression each, and what simple ones say of a column's values.

Bounds and choices come out of comparisons of one column with a constant (`a >= 1`, `BETWEEN`, `IN`, `a = 'x' OR
a = 'y'`, `a = ANY (ARRAY[…])`), joined by AND. An exclusive bound becomes the next value that the type can hold: the
next integer, the next day, the next step of a DECIMAL's scale (0.01 where it states none).
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from quantlab.text2sql.dialects.clock import fix_clock
from quantlab.text2sql.dialects.transpile import expression_to_sqlite
from quantlab.text2sql.schema.columns import RawColumn, RawTable
from quantlab.text2sql.sqlglot_log import quiet_sqlglot

MAX_CHECK = 4000  # characters


@dataclass(frozen=True)
class Bound:
    """What a check says of one column."""

    column: str
    low: float | str | None = None
    high: float | str | None = None
    choices: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Check:
    """`sql` for SQLite; `reason` says why there is none."""

    sql: str
    bounds: tuple[Bound, ...]
    reason: str


def read_check(text: str, table: RawTable, dialect: str) -> Check:
    """The CHECK whose parentheses hold `text`. Never raises."""
    if len(text) > MAX_CHECK:
        return Check("", (), f"it is longer than {MAX_CHECK} characters")
    try:
        if dialect == "sqlite":
            condition = _parse_sqlite(fix_clock(text))
        else:
            kinds = {column.name.lower(): column.type.kind for column in table.columns}
            condition = expression_to_sqlite(text, dialect, kinds)
        _settle_names(condition, table, dialect)
        bounds = tuple(_bounds(condition, table))
        return Check(condition.sql(dialect="sqlite", comments=False, normalize_functions=False), bounds, "")
    except (SqlglotError, ValueError, RecursionError, OverflowError) as error:
        return Check("", (), str(error).partition("\n")[0] or type(error).__name__)


def _parse_sqlite(text: str) -> exp.Expression:
    with quiet_sqlglot():
        tree = sqlglot.parse_one(f"SELECT {text}", read="sqlite")
    given = [name for name, value in tree.args.items() if value]
    if not isinstance(tree, exp.Select) or given != ["expressions"] or len(tree.expressions) != 1:
        raise ValueError("it is not one expression")
    return tree.expressions[0]


def _settle_names(condition: exp.Expression, table: RawTable, dialect: str) -> None:
    """Columns as the table spells them, quoted. A name in double quotes that is no column is a string to SQLite."""
    for node in list(condition.walk()):
        if isinstance(node, exp.Query):
            raise ValueError("there is a query in it")
        if not isinstance(node, exp.Column):
            continue
        column = table.column(node.name)
        if column is not None:
            node.set("table", None)
            node.set("this", exp.to_identifier(column.name, quoted=True))
        elif dialect == "sqlite" and node.this.args.get("quoted") and not node.table:
            node.replace(exp.Literal.string(node.name))
        else:
            raise ValueError(f"there is no column {node.name}")


def _bounds(condition: exp.Expression, table: RawTable) -> Iterator[Bound]:
    """What the parts of `condition` that AND joins say of single columns."""
    waiting = [condition]
    while waiting:
        part = waiting.pop()
        if isinstance(part, exp.Paren):
            waiting.append(part.this)
        elif isinstance(part, exp.And):
            waiting += [part.this, part.expression]
        else:
            bound = _bound(part, table)
            if bound is not None:
                yield bound


def _bound(part: exp.Expression, table: RawTable) -> Bound | None:
    listed = _listed(part)
    if listed is not None:
        name, values = listed
        constants = [_constant(value) for value in values]
        column = table.column(name)
        if column is None or any(value is None for value in constants):
            return None
        return Bound(column.name, choices=tuple(dict.fromkeys(constants)))
    if isinstance(part, exp.Between) and not part.args.get("symmetric"):
        column = table.column(_column_of(part.this) or "")
        low, high = _constant(part.args["low"]), _constant(part.args["high"])
        if column is None or not (_fits(column, low) and _fits(column, high)):
            return None
        return Bound(column.name, low=low, high=high)
    if isinstance(part, exp.GT | exp.GTE | exp.LT | exp.LTE):
        return _comparison(part, table)
    return None


def _comparison(part: exp.Expression, table: RawTable) -> Bound | None:
    left, right = _column_of(part.this), _column_of(part.expression)
    lower = isinstance(part, exp.GT | exp.GTE) == (left is not None)  # the constant is a lower bound
    column = table.column((left if left is not None else right) or "")
    value = _constant(part.expression if left is not None else part.this)
    if column is None or (left is not None and right is not None) or not _fits(column, value):
        return None
    if isinstance(part, exp.GT | exp.LT):
        value = _beyond(column, value, 1 if lower else -1)
    if value is None:
        return None
    return Bound(column.name, low=value) if lower else Bound(column.name, high=value)


def _listed(part: exp.Expression) -> tuple[str, list[exp.Expression]] | None:
    """(column, values) of `column IN (…)`, of `column = ANY (ARRAY[…])`, of equalities joined by OR."""
    part = part.unnest()
    if isinstance(part, exp.Or):
        sides = [_listed(part.this), _listed(part.expression)]
        if sides[0] is None or sides[1] is None or sides[0][0].lower() != sides[1][0].lower():
            return None
        return sides[0][0], sides[0][1] + sides[1][1]
    name = _column_of(part.this) if isinstance(part, exp.In | exp.EQ) else None
    if name is None:
        return None
    if isinstance(part, exp.In):
        return (name, part.expressions) if part.expressions else None
    value = part.expression
    if isinstance(value, exp.Any):
        array = value.this.unnest()
        while isinstance(array, exp.Cast):
            array = array.this.unnest()
        return (name, array.expressions) if isinstance(array, exp.Array) else None
    return name, [value]


def _column_of(node: exp.Expression) -> str | None:
    """The name of a column, through parentheses and casts."""
    while isinstance(node, exp.Paren | exp.Cast):
        node = node.this
    return node.name if isinstance(node, exp.Column) else None


def _constant(node: exp.Expression) -> Any:
    """The value of a literal, through parentheses, a sign and casts; None for anything else."""
    sign = 1
    while isinstance(node, exp.Paren | exp.Cast | exp.Neg):
        sign = -sign if isinstance(node, exp.Neg) else sign
        node = node.this
    if isinstance(node, exp.Literal):
        if node.is_string:
            return node.name
        whole = node.name.isdecimal() and len(node.name) < 19
        value = int(node.name) if whole else float(node.name)
        return sign * value if math.isfinite(value) else None
    return None


def _fits(column: RawColumn, value: Any) -> bool:
    """Whether `value` can bound a column of this kind: a number a number, a date a date."""
    if column.type.kind in ("integer", "real"):
        return isinstance(value, int | float)
    return column.type.kind in ("date", "datetime", "time") and isinstance(value, str)


def _beyond(column: RawColumn, value: float | str, direction: int) -> float | str | None:
    """The next value above (1) or below (-1) `value`; None where there is no telling."""
    kind, scale = column.type.kind, column.type.scale
    if isinstance(value, str):
        if kind != "date":
            return None
        with contextlib.suppress(ValueError, OverflowError):
            return str(datetime.date.fromisoformat(value) + datetime.timedelta(days=direction))
        return None
    if kind == "integer":
        whole = int(value // 1)
        return whole + 1 if direction > 0 else (whole - 1 if whole == value else whole)
    scale = 2 if scale is None else scale
    return round(value + direction * 10**-scale, scale)
