"""Operators on numbers, and what `+` and `-` mean beside dates.

Division: MySQL's `/` is always of fractions; PostgreSQL's is of integers where both sides are, as SQLite's, which only
needs to be told of values that are NUMERIC there and integers here. Dividing by zero gives NULL, which is MySQL's way.
"""

from __future__ import annotations

import re

from sqlglot import exp

from quantlab.text2sql.dialects import functions
from quantlab.text2sql.dialects.dates import looks_temporal
from quantlab.text2sql.dialects.fields import DIFFERENCE, days_between
from quantlab.text2sql.dialects.intervals import Part, interval_parts, negated, shift
from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    Context,
    Untranslatable,
    atom,
    bare,
    binary,
    call,
    cast,
    integer_of,
    kind_of,
    mark,
    moment,
    moment_of,
    number,
    string_of,
    text,
)

_FRACTIONS = frozenset({"numeric", "real", "double"})


def divide(node: exp.Expression, context: Context) -> exp.Expression:
    left, right = node.this, node.expression
    kinds = {kind_of(left, context), kind_of(right, context)}
    fraction = context.dialect == "mysql" or bool(kinds & _FRACTIONS)
    if fraction and "real" not in kinds and not _is_real(left) and not _is_real(right):
        left = cast(bare(left), "REAL")
    divided = exp.Div(this=left.copy(), expression=right.copy(), typed=True, safe=True)
    if fraction:
        return mark(divided, "double" if "double" in kinds else "real")
    return mark(divided, "integer" if kinds == {"integer"} else "number")


def _is_real(node: exp.Expression) -> bool:
    inner = bare(node)
    return isinstance(inner, exp.Cast) and inner.to.this == exp.DType.DOUBLE


def integer_divide(node: exp.Expression, context: Context) -> exp.Expression:
    return functions.integer_division(node.this, node.expression)


def modulo(node: exp.Expression, context: Context) -> exp.Expression:
    return functions.modulo(node.this, node.expression, context)


def times(node: exp.Expression, context: Context) -> exp.Expression:
    """`*`, of an INTERVAL too."""
    for interval, factor in ((node.expression, node.this), (node.this, node.expression)):
        if isinstance(bare(interval), exp.Interval):
            return _interval_times(bare(interval), factor)
    return _numbers(node, context)


def _numbers(node: exp.Expression, context: Context) -> exp.Expression:
    """An operator on numbers: its value is of the kind of its sides."""
    for side in (node.this, node.expression):
        word = string_of(side)
        if (
            word is not None
            and context.dialect == "postgres"
            and not re.fullmatch(r"\s*[+-]?[\d.]+\s*", word)
        ):
            raise Untranslatable(f"arithmetic with the text {word!r} has no counterpart in SQLite")
    kinds = {kind_of(node.this, context), kind_of(node.expression, context)}
    for kind in ("double", "real", "numeric"):
        if kind in kinds:
            return mark(node, kind)
    return mark(node, "integer" if kinds == {"integer"} else "number")


def _interval_times(interval: exp.Expression, factor: exp.Expression) -> exp.Expression:
    parts = interval_parts(interval)
    whole = integer_of(factor)
    if len(parts) != 1 or not isinstance(parts[0].amount, int):
        raise Untranslatable(
            "a product of a number and an INTERVAL of several parts has no counterpart in SQLite"
        )
    amount = (
        number(whole * parts[0].amount)
        if whole is not None
        else binary(exp.Mul, factor, number(parts[0].amount))
    )
    return exp.Interval(
        this=amount, unit=exp.var({"months": "MONTH", "days": "DAY", "seconds": "SECOND"}[parts[0].unit])
    )


def plus(node: exp.Expression, context: Context) -> exp.Expression:
    left, right = node.this, node.expression
    if isinstance(bare(left), exp.Interval) and not isinstance(bare(right), exp.Interval):
        left, right = right, left
    if isinstance(bare(right), exp.Interval):
        return shift(left, interval_parts(bare(right)), context)
    if looks_temporal(right, context) and not looks_temporal(left, context):
        left, right = right, left
    moved = _days_moved(left, right, 1, context)
    return moved if moved is not None else _numbers(node, context)


def minus(node: exp.Expression, context: Context) -> exp.Expression:
    left, right = node.this, node.expression
    if isinstance(bare(right), exp.Interval):
        return shift(left, negated(interval_parts(bare(right))), context)
    kinds = looks_temporal(left, context), looks_temporal(right, context)
    known = moment_of(right)
    if kinds[0] is not None and kinds[1] is None and known is not None:
        kinds = kinds[0], known[1]  # a literal beside a date is one
    if None not in kinds:
        return _difference(node, kinds, context)
    if kinds[1] is not None:
        raise Untranslatable("a date that is subtracted from something unknown has no counterpart in SQLite")
    unknown = isinstance(bare(right), exp.Column | exp.Query) and kind_of(right, context) is None
    if kinds[0] is not None and unknown and context.dialect == "postgres":
        raise Untranslatable(f"whether {right.sql()} is a date or a number of days cannot be told")
    moved = _days_moved(left, right, -1, context)
    return moved if moved is not None else _numbers(node, context)


def _difference(
    node: exp.Expression, kinds: tuple[str | None, str | None], context: Context
) -> exp.Expression:
    """Two moments: PostgreSQL counts days between dates, and makes an interval of timestamps."""
    if context.dialect == "mysql":
        raise Untranslatable("MySQL subtracts dates as if they were numbers; DATEDIFF counts days")
    sides = (node.this, node.expression)
    if kinds == ("date", "date"):
        known = all(kind_of(side, context) == "date" for side in sides)
        if known or not _is_extracted(node):
            return mark(days_between(sides[1], sides[0], context), "integer")
    elif "moment" in kinds:
        raise Untranslatable(
            "a difference of values that may be dates or timestamps has no counterpart in SQLite"
        )
    return call(DIFFERENCE, *sides)


def _is_extracted(node: exp.Expression) -> bool:
    """Whether EXTRACT or DATE_PART takes something from this node, which only intervals allow."""
    parent = node.parent
    while isinstance(parent, exp.Paren):
        parent = parent.parent
    return isinstance(parent, exp.Extract) or (
        isinstance(parent, exp.Anonymous) and parent.name.upper() == "DATE_PART"
    )


def _days_moved(
    left: exp.Expression, right: exp.Expression, sign: int, context: Context
) -> exp.Expression | None:
    """PostgreSQL's date and a number of days; None where `left` is no moment."""
    kind = looks_temporal(left, context)
    if kind is None:
        return None
    if context.dialect == "mysql":
        if kind_of(left, context) is None:
            return None
        raise Untranslatable("MySQL adds a number to a date as if the date were one; DATE_ADD adds days")
    if kind != "date":
        raise Untranslatable("a timestamp and a plain number have no sum in PostgreSQL")
    whole = integer_of(right)
    if looks_temporal(right, context) or (whole is None and string_of(right) is not None):
        raise Untranslatable("a sum of two dates has no counterpart in SQLite")
    known = moment_of(left)
    if known is not None and whole is not None:
        return shift(moment(known[0], "date"), [Part("days", sign * whole)], Context("mysql", context.clock))
    if whole is not None:
        days = text(f"{sign * whole:+d} days")
    else:
        amount = right if sign > 0 else exp.Neg(this=atom(right))
        days = exp.DPipe(this=atom(amount), expression=text(" days"))
    return mark(call("DATE", left, days), "date")


def power(node: exp.Expression, context: Context) -> exp.Expression:
    return mark(call("POWER", node.this, node.expression), "real")


def exclusive_or(node: exp.Expression, context: Context) -> exp.Expression:
    sides = [exp.Paren(this=exp.Not(this=atom(side))) for side in (node.this, node.expression)]
    return exp.Paren(this=exp.NEQ(this=sides[0], expression=sides[1]))


def negative(node: exp.Expression, context: Context) -> exp.Expression:
    if isinstance(bare(node.this), exp.Interval):
        raise Untranslatable("a negative INTERVAL has no counterpart in SQLite")
    kind = kind_of(node.this, context)
    return mark(node, str(kind) if kind in NUMBERS else "number")
