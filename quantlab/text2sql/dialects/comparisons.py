"""Comparisons between dates, datetimes and what is written as one, and between text and numbers.

As text '2024-07-01' comes before '2024-07-01 00:00:00', which is the same moment. Where one side of a comparison is
computed, the literal takes the form that makes the comparison right whichever of the two forms the other side has: the
day for `>=` and `<`, the day with its midnight for `>` and `<=`. Where that cannot be, both sides become datetimes.

Text that compares with a column which neither the schema nor its name makes a date stays as it is.
"""

from __future__ import annotations

import datetime
import re

from sqlglot import exp

from quantlab.text2sql.dialects.dates import looks_temporal
from quantlab.text2sql.dialects.fields import DIFFERENCE, seconds_between
from quantlab.text2sql.dialects.intervals import interval_parts
from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    TEMPORAL,
    Context,
    Untranslatable,
    atom,
    bare,
    call,
    cast,
    kind_of,
    moment,
    moment_of,
    number,
    string_of,
)

_MIRROR = {
    exp.GT: exp.LT,
    exp.GTE: exp.LTE,
    exp.LT: exp.GT,
    exp.LTE: exp.GTE,
    exp.EQ: exp.EQ,
    exp.NEQ: exp.NEQ,
}
_TRUE, _FALSE = (
    frozenset({"t", "true", "yes", "on", "1", "y"}),
    frozenset({"f", "false", "no", "off", "0", "n"}),
)


def compare(node: exp.Expression, context: Context) -> exp.Expression:
    """`=`, `<>`, `<`, `<=`, `>`, `>=`."""
    quantified = _quantified(node)
    if quantified is not None:
        return quantified
    left, right = node.this, node.expression
    operator = type(node)
    if _is_constant(left) and not _is_constant(right):
        left, right, operator = right, left, _MIRROR[operator]
    left, right = _without_kind_clash(left, right, context)
    if isinstance(bare(right), exp.Interval):
        left, right = _difference(left), number(_seconds(bare(right)))
    elif _meet_as_moments(left, right, context):
        return _between_moments(operator, left, right, context)
    if left is node.this and right is node.expression:
        return node
    return operator(this=left.copy(), expression=right.copy())


def between(node: exp.Expression, context: Context) -> exp.Expression:
    """BETWEEN, as the two comparisons that it is where dates are involved."""
    low, high = node.args["low"], node.args["high"]
    if node.args.get("symmetric"):
        raise Untranslatable("BETWEEN SYMMETRIC has no counterpart in SQLite")
    if not (_meet_as_moments(node.this, low, context) or _meet_as_moments(node.this, high, context)):
        return node
    lower = _between_moments(exp.GTE, node.this, low, context)
    upper = _between_moments(exp.LTE, node.this, high, context)
    if isinstance(lower, exp.GTE) and isinstance(upper, exp.LTE) and lower.this == upper.this:
        return exp.Between(this=lower.this.copy(), low=lower.expression.copy(), high=upper.expression.copy())
    return exp.Paren(this=exp.And(this=lower, expression=upper))


def among(node: exp.Expression, context: Context) -> exp.Expression:
    """IN: rows of values get their VALUES; moments the form of what they are compared with."""
    values = node.expressions
    if not values:
        return node
    if all(isinstance(value, exp.Tuple) for value in values):
        return exp.In(
            this=node.this.copy(), query=exp.Subquery(this=exp.Values(expressions=[v.copy() for v in values]))
        )
    if any(_meet_as_moments(node.this, value, context) for value in values):
        branches = [_between_moments(exp.EQ, node.this, value, context) for value in values]
        found = branches[0]
        for branch in branches[1:]:
            found = exp.Or(this=found, expression=branch)
        return exp.Paren(this=found)
    return node


def _is_constant(node: exp.Expression) -> bool:
    return isinstance(bare(node), exp.Literal | exp.Interval | exp.Neg)


def _meet_as_moments(left: exp.Expression, right: exp.Expression, context: Context) -> bool:
    """Whether one side is computed as a moment, or is a column of such a type.

    Where no schema tells: whether a column that looks like one meets a literal that is one, or a column that looks
    like a date one that looks like a timestamp.
    """
    if kind_of(left, context) in TEMPORAL or kind_of(right, context) in TEMPORAL:
        return True
    looks = looks_temporal(left, context), looks_temporal(right, context)
    if (looks[0] and moment_of(right)) or (looks[1] and moment_of(left)):
        return True
    return set(looks) == {"date", "datetime"}


def _between_moments(
    operator: type[exp.Expression], left: exp.Expression, right: exp.Expression, context: Context
) -> exp.Expression:
    if _is_constant(left) and not _is_constant(right):
        left, right, operator = right, left, _MIRROR[operator]
    if "time" in (kind_of(left, context), kind_of(right, context)):
        return operator(this=left.copy(), expression=right.copy())
    known = moment_of(right)
    if known is None:
        kinds = {kind_of(left, context), kind_of(right, context)}
        if kinds in ({"date"}, {"datetime"}) or _is_other(left) or _is_other(right):
            return operator(this=left.copy(), expression=right.copy())
        return operator(this=_datetime(left), expression=_datetime(right))
    when, form = known[0], kind_of(left, context)
    if form == "date" and context.dialect == "postgres" and kind_of(right, context) is None:
        # Text beside a date is read as a date, whatever else it says.
        return operator(this=left.copy(), expression=moment(when, "date"))
    column = isinstance(bare(left), exp.Column)
    if form == "moment" or (form == "datetime" and not column):
        if form == "moment":
            left = call("DATETIME", left)
        return operator(this=left.copy(), expression=moment(when, "datetime"))
    if when.time() != datetime.time.min:
        # A day compares with a time on it as its midnight does; only equality could tell them apart.
        return operator(this=left.copy(), expression=moment(when, "datetime"))
    if form == "date":
        return operator(this=left.copy(), expression=moment(when, "date"))
    # A column of datetimes may well hold days.
    if operator in (exp.EQ, exp.NEQ):
        both = exp.In(this=left.copy(), expressions=[moment(when, "date"), moment(when, "datetime")])
        return both if operator is exp.EQ else exp.Not(this=both)
    return operator(
        this=left.copy(), expression=moment(when, "date" if operator in (exp.GTE, exp.LT) else "datetime")
    )


def _is_other(node: exp.Expression) -> bool:
    """Text that is no moment, a number, NULL, or a query: left to compare as it is."""
    return isinstance(bare(node), exp.Literal | exp.Null | exp.Query | exp.Neg | exp.Any | exp.All)


def _datetime(node: exp.Expression) -> exp.Expression:
    known = moment_of(node)
    return moment(known[0], "datetime") if known is not None else call("DATETIME", node)


def _difference(node: exp.Expression) -> exp.Expression:
    inner = bare(node)
    if not (isinstance(inner, exp.Anonymous) and inner.name == DIFFERENCE):
        raise Untranslatable(
            "an INTERVAL that is compared with something else than a difference has no counterpart in SQLite"
        )
    return seconds_between(inner.expressions[1], inner.expressions[0])


def _seconds(interval: exp.Expression) -> int:
    seconds = {"days": 86400, "seconds": 1}
    total = 0
    for part in interval_parts(interval):
        if part.unit not in seconds or not isinstance(part.amount, int):
            raise Untranslatable("an INTERVAL of months in a comparison has no counterpart in SQLite")
        total += part.amount * seconds[part.unit]
    return total


def _without_kind_clash(
    left: exp.Expression, right: exp.Expression, context: Context
) -> tuple[exp.Expression, exp.Expression]:
    """Text against a number: MySQL compares numbers, PostgreSQL refuses, SQLite finds them unequal. A boolean
    against 'true': PostgreSQL reads the text, as it does beside a number, where SQLite does so for columns alone."""
    kind = kind_of(left, context)
    is_number = isinstance(bare(right), exp.Literal) and not bare(right).is_string
    if kind == "text" and is_number:
        if context.dialect == "postgres":
            raise Untranslatable("PostgreSQL does not compare text with a number")
        return cast(left, "REAL"), right
    if kind in TEMPORAL and is_number:
        raise Untranslatable("a date that is compared with a number has no counterpart in SQLite")
    word = (string_of(right) or "").strip().lower()
    if kind in NUMBERS and string_of(right) is not None:
        return left, _number_in(word, context)
    if kind == "boolean" and context.dialect == "postgres" and word in _TRUE | _FALSE:
        return atom(left), exp.true() if word in _TRUE else exp.false()
    return left, right


def _number_in(word: str, context: Context) -> exp.Expression:
    """Text beside a number: MySQL takes the number that it begins with."""
    match = re.match(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)", word)
    if context.dialect == "postgres" and (match is None or match.end() < len(word)):
        raise Untranslatable(f"PostgreSQL does not read {word!r} as a number")
    return exp.Literal.number(match.group().lstrip("+") if match is not None else "0")


def _quantified(node: exp.Expression) -> exp.Expression | None:
    """`= ANY (…)` and `<> ALL (…)` of a query or an array written out: IN and NOT IN. Others are refused."""
    side = node.expression
    word = "ANY" if isinstance(side, exp.Any) else "ALL" if isinstance(side, exp.All) else ""
    if isinstance(side, exp.Anonymous) and side.name.upper() in ("ANY", "ALL", "SOME"):
        word, inner = side.name.upper(), side.expressions[0]
    elif word:
        inner = side.this
    else:
        return None
    wanted = exp.EQ if word in ("ANY", "SOME") else exp.NEQ
    inner = bare(inner)
    while isinstance(inner, exp.Cast):
        inner = bare(inner.this)
    if type(node) is wanted and isinstance(inner, exp.Array) and inner.expressions:
        found = exp.In(this=node.this.copy(), expressions=[value.copy() for value in inner.expressions])
    elif type(node) is wanted and isinstance(inner, exp.Query):
        query = inner if isinstance(inner, exp.Subquery) else exp.Subquery(this=inner.copy())
        found = exp.In(this=node.this.copy(), query=query.copy())
    else:
        raise Untranslatable(f"a comparison with {word} has no counterpart in SQLite")
    return exp.Not(this=found) if wanted is exp.NEQ else found
