"""Every class of sqlglot's nodes that needs a rule, and the functions with a syntax of their own.

`HANDLERS` maps a class to what takes a node's place; the nodes below it have been replaced already. A class that is
neither here nor in `check.ALLOWED` has no counterpart in SQLite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sqlglot import exp

from quantlab.text2sql.dialects import arithmetic, comparisons, dates, formats, functions, patterns, texts
from quantlab.text2sql.dialects.casts import convert
from quantlab.text2sql.dialects.fields import field_of, now, time_now, today
from quantlab.text2sql.dialects.handlers import common_kind
from quantlab.text2sql.dialects.nodes import (
    Context,
    Untranslatable,
    atom,
    call,
    join_text,
    mark,
    number,
    string_of,
    text,
)

NodeHandler: TypeAlias = Callable[[exp.Expression, Context], exp.Expression]


def _extract(node: exp.Expression, context: Context) -> exp.Expression:
    return field_of(node.this.name, node.expression, context)


def _trim(node: exp.Expression, context: Context) -> exp.Expression:
    """PostgreSQL and SQLite take a set of characters off; MySQL a piece of text as a whole."""
    characters = [node.expression] if node.args.get("expression") is not None else []
    if characters and context.dialect == "mysql" and len(string_of(characters[0]) or "") != 1:
        raise Untranslatable("TRIM of more than one character has no counterpart in SQLite")
    name = {"LEADING": "LTRIM", "TRAILING": "RTRIM"}.get((node.args.get("position") or "").upper(), "TRIM")
    return mark(call(name, node.this, *characters), "text")


def _substring(node: exp.Expression, context: Context) -> exp.Expression:
    arguments = [node.this, node.args.get("start") or number(1)]
    length = node.args.get("length")
    return texts.substring(arguments + ([length] if length is not None else []), context)


def _position(node: exp.Expression, context: Context) -> exp.Expression:
    if node.args.get("position") is not None:
        raise Untranslatable("LOCATE from a position has no counterpart in SQLite")
    return texts.position(node.this, node.args["substr"], context)


def _group_concat(node: exp.Expression, context: Context) -> exp.Expression:
    """GROUP_CONCAT and STRING_AGG. Without ORDER BY the order is the database's own in every dialect."""
    value, separator = node.this, node.args.get("separator")
    if isinstance(value, exp.Order):
        raise Untranslatable("GROUP_CONCAT and STRING_AGG with ORDER BY have no counterpart in SQLite")
    if isinstance(value, exp.Limit):
        raise Untranslatable("GROUP_CONCAT with LIMIT has no counterpart in SQLite")
    if separator is None and context.dialect == "postgres":
        raise Untranslatable("STRING_AGG needs a separator")
    if isinstance(value, exp.Distinct):
        if len(value.expressions) != 1:
            raise Untranslatable("GROUP_CONCAT(DISTINCT …) of several values has no counterpart in SQLite")
        if separator is not None and string_of(separator) != ",":
            raise Untranslatable(
                "GROUP_CONCAT(DISTINCT …) with another separator than ',' has no counterpart in SQLite"
            )
        return mark(call("GROUP_CONCAT", value), "text")
    if isinstance(value, exp.Concat):
        value = join_text(value.expressions)
    return mark(call("GROUP_CONCAT", value, *([separator] if separator is not None else [])), "text")


def _joined_literals(node: exp.Expression, context: Context) -> exp.Expression:
    """'a' 'b', which is one string. (CONCAT is no node of this class here.)"""
    parts = [string_of(part) for part in node.expressions]
    if isinstance(node.parent, exp.GroupConcat | exp.Order | exp.Limit):
        return node
    if any(part is None for part in parts):
        raise Untranslatable("strings side by side have no counterpart in SQLite")
    return text("".join(part for part in parts if part is not None))


def _plain_string(node: exp.Expression, context: Context) -> exp.Expression:
    value = node.expression if isinstance(node, exp.Introducer) else node.this
    return value.copy() if isinstance(value, exp.Expression) else text(str(value))


def _escape(node: exp.Expression, context: Context) -> exp.Expression:
    """`LIKE … ESCAPE …`; the LIKE below it has been left for here."""
    character = string_of(node.expression)
    if character is None or len(character) > 1:
        raise Untranslatable("ESCAPE needs one character")
    if not isinstance(node.this, exp.Like | exp.ILike):
        return node  # made here
    return patterns.like(node.this, context, character)


def _like(node: exp.Expression, context: Context) -> exp.Expression:
    return node if isinstance(node.parent, exp.Escape) else patterns.like(node, context)


def _bits(node: exp.Expression, context: Context) -> exp.Expression:
    if context.dialect == "postgres":
        raise Untranslatable("a bit string has no counterpart in SQLite")
    return number(int(str(node.this), 2))


def _at_time_zone(node: exp.Expression, context: Context) -> exp.Expression:
    if (string_of(node.args.get("zone")) or "").upper() not in ("UTC", "GMT"):
        raise Untranslatable("AT TIME ZONE has no counterpart in SQLite")
    return node.this.copy()


def _collate(node: exp.Expression, context: Context) -> exp.Expression:
    name = node.expression.name.lower()
    if name.endswith(("_bin", "_cs")) or name in ("binary", "c", "posix"):
        return node.this.copy()
    if name.endswith("_ci"):
        return exp.Collate(this=node.this.copy(), expression=exp.var("NOCASE"))
    raise Untranslatable(f"the collation {node.expression.name} has no counterpart in SQLite")


def _complement(node: exp.Expression, context: Context) -> exp.Expression:
    if context.dialect == "mysql":
        raise Untranslatable(
            "the operator ~, whose result has no sign in MySQL, has no counterpart in SQLite"
        )
    return node


def _case(node: exp.Expression, context: Context) -> exp.Expression:
    values = [branch.args["true"] for branch in node.args["ifs"]]
    default = node.args.get("default")
    return common_kind(node, values + ([default] if default is not None else []), context)


def _if(node: exp.Expression, context: Context) -> exp.Expression:
    if isinstance(node.parent, exp.Case):
        return node
    branches = [node.this, node.args["true"], node.args.get("false") or exp.Null()]
    return functions.conditional(branches, context)


def _null_safe(node: exp.Expression, context: Context) -> exp.Expression:
    same = exp.Is(this=atom(node.this), expression=atom(node.expression))
    return exp.Paren(this=same if isinstance(node, exp.NullSafeEQ) else exp.Not(this=same))


def _function(node: exp.Expression, context: Context) -> exp.Expression:
    """A function by its name."""
    name = node.name.upper()
    if name in ("ANY", "ALL", "SOME"):
        return node  # of a comparison
    for module in (functions, texts, dates, formats):
        allowed, handler = module.FUNCTIONS[context.dialect].get(name, (range(0), None))
        if handler is not None:
            if len(node.expressions) not in allowed:
                raise Untranslatable(f"{name} with {len(node.expressions)} arguments is not known")
            return handler(node.expressions, context)
    raise Untranslatable(f"the function {name} has no counterpart in SQLite")


def _starts_with(node: exp.Expression, context: Context) -> exp.Expression:
    return texts.starts_with([node.this, node.expression], context)


def _clock(make: Callable[[Context], exp.Expression]) -> NodeHandler:
    return lambda node, context: make(context)


def _local_time(node: exp.Expression, context: Context) -> exp.Expression:
    return now(context) if context.dialect == "mysql" else time_now(context)


HANDLERS: dict[type[exp.Expression], NodeHandler] = {
    exp.Anonymous: _function,
    exp.Div: arithmetic.divide, exp.IntDiv: arithmetic.integer_divide, exp.Mod: arithmetic.modulo,
    exp.Mul: arithmetic.times, exp.Add: arithmetic.plus, exp.Sub: arithmetic.minus, exp.Neg: arithmetic.negative,
    exp.Pow: arithmetic.power, exp.Xor: arithmetic.exclusive_or,
    **dict.fromkeys((exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE), comparisons.compare),
    exp.Between: comparisons.between, exp.In: comparisons.among,
    exp.NullSafeEQ: _null_safe, exp.NullSafeNEQ: _null_safe,
    exp.Like: _like, exp.ILike: _like, exp.Escape: _escape,
    exp.RegexpLike: patterns.regexp, exp.RegexpILike: patterns.regexp, exp.StartsWith: _starts_with,
    exp.Cast: convert, exp.Extract: _extract, exp.AtTimeZone: _at_time_zone, exp.Collate: _collate,
    exp.Trim: _trim, exp.Substring: _substring, exp.StrPosition: _position, exp.GroupConcat: _group_concat,
    exp.Concat: _joined_literals, exp.Case: _case, exp.If: _if,
    exp.CurrentDate: _clock(today), exp.CurrentTimestamp: _clock(now), exp.CurrentTime: _clock(time_now),
    exp.Localtimestamp: _clock(now), exp.Localtime: _local_time,
    **dict.fromkeys((exp.National, exp.RawString, exp.ByteString, exp.Introducer), _plain_string),
    exp.BitString: _bits, exp.BitwiseNot: _complement,
}  # fmt: skip
