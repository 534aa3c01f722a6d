"""Building blocks: SQLite expressions as sqlglot nodes, and what is known of a value's type.

A node may be marked with the kind of value it has in its own dialect: "date", "datetime", "time", "moment" (a date or a
datetime, only the value tells), "text", "boolean", "integer", "real" and "double" (REAL in SQLite too; "double" where
PostgreSQL rounds it as one), "numeric" (PostgreSQL's, which divides like a fraction even where SQLite holds an
integer), "number" (one of these). Columns have the kind that
the schema gives them, where there is one. No mark: not known.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlglot import exp

TEMPORAL = frozenset({"date", "datetime", "moment"})
NUMBERS = frozenset({"integer", "real", "double", "numeric", "number"})
_MARK = "quantlab_kind"
_MOMENT = re.compile(
    r"\s*(\d{4})-(\d{1,2})-(\d{1,2})(?:[ T](\d{1,2}):(\d{2})(?::(\d{2})(?:\.0*)?)?)?(?:Z|\+00(?::?00)?)?\s*"
)


class Untranslatable(ValueError):
    """Something that has no counterpart in SQLite; the text names it."""


@dataclass(frozen=True)
class Context:
    """What handlers need to know: the dialect, the fixed clock, and the kinds of columns by lower-case name.

    `typed`: the kinds come from a schema, so a name that is not among them is no date either.
    """

    dialect: str
    clock: datetime.datetime
    columns: Mapping[str, str] = field(default_factory=dict)
    typed: bool = False


def call(name: str, *arguments: exp.Expression) -> exp.Expression:
    """A function call; arguments are copied, so one node may be used several times."""
    return exp.Anonymous(this=name, expressions=[argument.copy() for argument in arguments])


def text(value: str) -> exp.Expression:
    return exp.Literal.string(value)


def number(value: int) -> exp.Expression:
    literal = exp.Literal.number(abs(value))
    return literal if value >= 0 else exp.Neg(this=literal)


def cast(node: exp.Expression, affinity: str) -> exp.Expression:
    """CAST to INTEGER, REAL, TEXT or BLOB."""
    names = {"INTEGER": "INT", "REAL": "DOUBLE", "TEXT": "TEXT", "BLOB": "BLOB"}
    return exp.Cast(this=node.copy(), to=exp.DataType.build(names[affinity]))


def binary(kind: type[exp.Expression], left: exp.Expression, right: exp.Expression) -> exp.Expression:
    """An operator in parentheses; so are operands that are operators themselves."""
    return exp.Paren(this=kind(this=atom(left), expression=atom(right)))


def quotient(left: exp.Expression, right: exp.Expression) -> exp.Expression:
    """`left / right` as SQLite divides, in parentheses."""
    return exp.Paren(this=exp.Div(this=atom(left), expression=atom(right), typed=True, safe=True))


def atom(node: exp.Expression) -> exp.Expression:
    """A copy of `node` that can be an operand of anything."""
    loose = isinstance(node, exp.Binary | exp.Not | exp.Between | exp.In | exp.Neg | exp.Collate | exp.Escape)
    return exp.Paren(this=node.copy()) if loose else node.copy()


def join_text(parts: list[exp.Expression]) -> exp.Expression:
    """`a || b || c` in parentheses."""
    joined = atom(parts[0])
    for part in parts[1:]:
        joined = exp.DPipe(this=joined, expression=atom(part))
    return mark(exp.Paren(this=joined) if len(parts) > 1 else joined, "text")


def case(*branches: tuple[exp.Expression, exp.Expression], otherwise: exp.Expression) -> exp.Expression:
    """CASE WHEN … THEN … ELSE … END."""
    ifs = [exp.If(this=when.copy(), true=then.copy()) for when, then in branches]
    return exp.Case(ifs=ifs, default=otherwise.copy())


def mark(node: exp.Expression, kind: str) -> exp.Expression:
    node.meta[_MARK] = kind
    return node


def kind_of(node: exp.Expression | None, context: Context) -> str | None:
    """The kind of a value, where it is known."""
    while isinstance(node, exp.Paren | exp.Alias | exp.Window | exp.Filter | exp.Subquery | exp.Select):
        if _MARK in node.meta:
            break
        if isinstance(node, exp.Select):
            node = node.expressions[0] if len(node.expressions) == 1 else None
        else:
            node = node.this
    if node is None:
        return None
    if _MARK in node.meta:
        return str(node.meta[_MARK])
    if isinstance(node, exp.Column):
        return context.columns.get(node.name.lower())
    if isinstance(node, exp.Literal) and not node.is_string:
        return "integer" if node.name.isdecimal() else "real"
    if isinstance(node, exp.Boolean | exp.Predicate | exp.Connector | exp.Not):
        return "boolean"
    return None


def bare(node: exp.Expression) -> exp.Expression:
    """The node inside any parentheses."""
    while isinstance(node, exp.Paren):
        node = node.this
    return node


def integer_of(node: exp.Expression | None) -> int | None:
    """The value of an integer literal, with a sign perhaps, or of a string that is one."""
    sign = 1
    while isinstance(node, exp.Paren | exp.Neg):
        sign = -sign if isinstance(node, exp.Neg) else sign
        node = node.this
    if isinstance(node, exp.Literal) and re.fullmatch(r"\s*[+-]?\d{1,15}\s*", node.name):
        return sign * int(node.name)
    return None


def string_of(node: exp.Expression | None) -> str | None:
    """The value of a string literal."""
    inner = bare(node) if node is not None else None
    return inner.name if isinstance(inner, exp.Literal) and inner.is_string else None


def moment_of(node: exp.Expression | None) -> tuple[datetime.datetime, str] | None:
    """(when, "date" or "datetime") of a literal that is a moment; None for anything else."""
    value = string_of(node)
    match = _MOMENT.fullmatch(value) if value is not None else None
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups())
    try:
        when = datetime.datetime(year, month, day, hour, minute, second)
    except ValueError:
        return None
    return when, "date" if match.group(4) is None else "datetime"


def moment(when: datetime.datetime, kind: str) -> exp.Expression:
    """The literal of a date or a datetime."""
    return mark(text(when.strftime("%Y-%m-%d") if kind == "date" else when.isoformat(" ", "seconds")), kind)
