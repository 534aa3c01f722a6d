"""Casts: rounding where SQLite would cut, and types that it does not have."""

from __future__ import annotations

from sqlglot import exp

from quantlab.text2sql.dialects.fields import as_date, as_datetime, now, today
from quantlab.text2sql.dialects.functions import rounded
from quantlab.text2sql.dialects.intervals import Part, shift
from quantlab.text2sql.dialects.nodes import (
    Context,
    Untranslatable,
    atom,
    bare,
    call,
    cast,
    integer_of,
    kind_of,
    mark,
    moment_of,
    number,
    string_of,
    text,
)

_INTEGERS = frozenset(
    {"INT", "BIGINT", "SMALLINT", "TINYINT", "MEDIUMINT", "UINT", "UBIGINT", "USMALLINT", "UTINYINT"}
)
_FLOATS = frozenset({"DOUBLE", "FLOAT"})
_TEXTS = frozenset({"TEXT", "VARCHAR", "CHAR", "NVARCHAR", "NCHAR", "BPCHAR", "NAME"})


def convert(node: exp.Expression, context: Context) -> exp.Expression:
    value, to = node.this, node.to
    name = to.this.value if isinstance(to.this, exp.DType) else str(to.this)
    sizes = [integer_of(size.this) for size in to.expressions if isinstance(size, exp.DataTypeParam)]
    if name in _INTEGERS:
        return mark(_as_integer(value, context), "integer")
    if name in _FLOATS:
        return mark(cast(value, "REAL"), "double")
    if name == "DECIMAL":
        return _as_decimal(value, sizes, context)
    if name in _TEXTS:
        return _as_text(value, name, sizes, context)
    if name == "DATE":
        return as_date(_special_moment(value, context))
    if name in ("TIMESTAMP", "TIMESTAMPTZ", "DATETIME", "TIMESTAMPNTZ", "TIMESTAMPLTZ"):
        return as_datetime(_special_moment(value, context))
    if name == "TIME":
        return mark(value.copy() if kind_of(value, context) == "time" else call("TIME", value), "time")
    if name == "INTERVAL":
        return _as_interval(value, to)
    if name == "BOOLEAN":
        return _as_boolean(value, context)
    if name == "ARRAY" and isinstance(bare(value), exp.Array):
        return bare(value)  # written out: of a comparison with ANY
    if name in ("CHARACTER_SET", "BINARY", "VARBINARY") and context.dialect == "mysql":
        if isinstance(node.parent, exp.Like | exp.RegexpLike | exp.Escape):
            return node  # there it says that case counts
        return value  # text stays text, and compares by case here anyway
    raise Untranslatable(f"a cast to {to.sql(dialect=context.dialect).upper()} has no counterpart in SQLite")


def _as_integer(value: exp.Expression, context: Context) -> exp.Expression:
    """Fractions are rounded; SQLite's own cast cuts them off."""
    if kind_of(value, context) in ("integer", "boolean") or integer_of(value) is not None:
        return cast(value, "INTEGER")
    if context.dialect == "mysql" and kind_of(value, context) == "text":
        return cast(value, "INTEGER")  # text is cut
    return cast(rounded(value, context), "INTEGER")


def _as_decimal(value: exp.Expression, sizes: list[int | None], context: Context) -> exp.Expression:
    if not sizes and context.dialect == "postgres":
        return mark(cast(value, "REAL"), "real")
    scale = sizes[1] if len(sizes) > 1 else 0
    if scale is None:
        raise Untranslatable("a cast to a DECIMAL of unknown scale has no counterpart in SQLite")
    return mark(call("ROUND", cast(value, "REAL"), *([number(scale)] if scale else [])), "real")


def _as_text(value: exp.Expression, name: str, sizes: list[int | None], context: Context) -> exp.Expression:
    if kind_of(value, context) == "boolean" and context.dialect == "postgres":
        raise Untranslatable("a cast of a boolean to text has no counterpart in SQLite")
    if not sizes and name in ("CHAR", "BPCHAR") and context.dialect == "postgres":
        sizes = [1]
    found = cast(value, "TEXT")
    if sizes and sizes[0] is not None:
        found = call("SUBSTR", found, number(1), number(sizes[0]))
    return mark(found, "text")


def _as_boolean(value: exp.Expression, context: Context) -> exp.Expression:
    word = (string_of(value) or "").strip().lower()
    if word in ("t", "true", "yes", "on", "1", "y"):
        return exp.true()
    if word in ("f", "false", "no", "off", "0", "n"):
        return exp.false()
    if string_of(value) is not None or kind_of(value, context) == "text":
        raise Untranslatable("a cast of text to BOOLEAN has no counterpart in SQLite")
    return mark(exp.Paren(this=exp.NEQ(this=atom(value), expression=number(0))), "boolean")


def _special_moment(value: exp.Expression, context: Context) -> exp.Expression:
    """'today', 'now', 'yesterday' and 'tomorrow' of PostgreSQL."""
    word = (string_of(value) or "").strip().lower()
    if word == "now":
        return now(context)
    steps = {"today": 0, "yesterday": -1, "tomorrow": 1}
    if word in steps:
        return shift(today(context), [Part("days", steps[word])], Context("mysql", context.clock))
    if string_of(value) is not None and moment_of(value) is None:
        raise Untranslatable(f"the date {string_of(value)!r} cannot be read by SQLite")
    return value


def _as_interval(value: exp.Expression, to: exp.Expression) -> exp.Expression:
    """'1 day'::interval, and (n || ' days')::interval."""
    if string_of(value) is not None:
        return exp.Interval(this=text(string_of(value) or ""))
    inner = bare(value)
    unit = string_of(inner.expression) if isinstance(inner, exp.DPipe) else None
    if unit is None or not unit.strip().isalpha():
        raise Untranslatable(
            "a cast to INTERVAL of something that is no literal has no counterpart in SQLite"
        )
    amount = inner.this
    if isinstance(amount, exp.Cast) and amount.to.this == exp.DType.TEXT:
        amount = amount.this
    return exp.Interval(this=amount.copy(), unit=exp.var(unit.strip().upper()))
