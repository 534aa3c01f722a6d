"""INTERVAL arithmetic: a moment, and years, months, days or hours before or after it.

A month's end stays inside the month (31 March minus one month is 29 February 2024), in MySQL as in PostgreSQL;
SQLite's own `'-1 month'` would run over into March. So months are added twice, to the day and to the first of its
month, and the earlier of the day that comes out and that month's last day counts. Where the moment and the interval are
literals (or the clock), the result is a literal.

MySQL: a DATE and days or longer make a DATE, anything else a DATETIME; PostgreSQL: always a timestamp. Of a column
whose type is not known the value's length decides.
"""

from __future__ import annotations

import calendar
import datetime
import re
from dataclasses import dataclass

from sqlglot import exp

from quantlab.text2sql.dialects.nodes import (
    Context,
    Untranslatable,
    atom,
    bare,
    binary,
    call,
    case,
    integer_of,
    join_text,
    kind_of,
    mark,
    moment,
    moment_of,
    number,
    string_of,
    text,
)

# Unit → (SQLite's unit that it is a multiple of, how many).
UNITS: dict[str, tuple[str, int]] = {
    "YEAR": ("months", 12), "QUARTER": ("months", 3), "MONTH": ("months", 1), "WEEK": ("days", 7), "DAY": ("days", 1),
    "HOUR": ("seconds", 3600), "MINUTE": ("seconds", 60), "SECOND": ("seconds", 1), "DECADE": ("months", 120),
}  # fmt: skip
_SHORT = {
    "Y": "YEAR", "YR": "YEAR", "MON": "MONTH", "W": "WEEK", "D": "DAY", "H": "HOUR", "HR": "HOUR", "M": "MINUTE",
    "MIN": "MINUTE", "S": "SECOND", "SEC": "SECOND",
}  # fmt: skip
_ONE_PART = re.compile(r"\s*([+-]?\d+)\s*([A-Za-z]+)\s*,?")


@dataclass(frozen=True)
class Part:
    """`amount` of SQLite's months, days or seconds; an expression is multiplied by `factor`."""

    unit: str
    amount: int | exp.Expression
    factor: int = 1


def unit_of(name: str) -> str:
    """The unit that a word names, in any number or spelling; Untranslatable for others."""
    upper = name.upper().strip().removeprefix("SQL_TSI_")
    for word in (upper, upper.removesuffix("S")):
        found = _SHORT.get(word, word)
        if found in UNITS or found == "CENTURY":
            return found
    raise Untranslatable(f"the unit {name.lower()!r} has no counterpart in SQLite")


def interval_parts(node: exp.Expression) -> list[Part]:
    """The parts of an INTERVAL node."""
    unit = node.args.get("unit")
    value = string_of(node.this)
    if unit is None:
        if value is None:
            raise Untranslatable("an INTERVAL without a unit has no counterpart in SQLite")
        return _compound(value)
    if not isinstance(unit, exp.Var):
        raise Untranslatable(f"INTERVAL … {unit.sql().upper()} has no counterpart in SQLite")
    name = unit_of(unit.name)
    return [_part(node.this, name)]


def _part(amount: exp.Expression, unit: str) -> Part:
    if unit not in UNITS:
        raise Untranslatable(f"an INTERVAL in units of {unit.lower()} has no counterpart in SQLite")
    base, factor = UNITS[unit]
    whole = integer_of(amount)
    if whole is not None:
        return Part(base, whole * factor)
    if isinstance(bare(amount), exp.Literal):
        raise Untranslatable(f"INTERVAL {amount.sql()} {unit.lower()} has no counterpart in SQLite")
    return Part(base, amount, factor)


def amount_part(amount: exp.Expression, unit: str) -> Part:
    """`amount` of the unit with this name."""
    return _part(amount, unit_of(unit))


def _compound(value: str) -> list[Part]:
    """PostgreSQL's '1 year 2 months -3 days'."""
    parts: list[Part] = []
    at = 0
    while value[at:].strip():
        match = _ONE_PART.match(value, at)
        if match is None:
            raise Untranslatable(f"the interval {value!r} has no counterpart in SQLite")
        parts.append(_part(number(int(match.group(1))), unit_of(match.group(2))))
        at = match.end()
    if not parts:
        raise Untranslatable("an empty interval has no counterpart in SQLite")
    # Years and months are one number, so are hours and minutes: '2 years -1 month' never stops after two years.
    sums: dict[str, int] = {}
    for part in parts:
        assert isinstance(part.amount, int)
        sums[part.unit] = sums.get(part.unit, 0) + part.amount
    return [Part(unit, amount) for unit, amount in sums.items()]


def negated(parts: list[Part]) -> list[Part]:
    return [
        Part(part.unit, -part.amount if isinstance(part.amount, int) else part.amount, -part.factor)
        for part in parts
    ]


def shift(base: exp.Expression, parts: list[Part], context: Context) -> exp.Expression:
    """`base` and the interval after it; the result is marked date, datetime or moment."""
    if kind_of(base, context) == "time":
        raise Untranslatable("an INTERVAL after a time of day has no counterpart in SQLite")
    form = _form(base, parts, context)
    known = moment_of(base)
    if known is not None and all(isinstance(part.amount, int) for part in parts):
        when = known[0]
        for part in sorted(parts, key=lambda part: ("months", "days", "seconds").index(part.unit)):
            assert isinstance(part.amount, int)
            when = _shift_literal(when, part.unit, part.amount)
        return moment(when, known[1] if form == "moment" else form)
    if form == "moment":
        long = exp.GT(this=call("LENGTH", base), expression=number(10))
        days, times = _shifted(base, parts, "date"), _shifted(base, parts, "datetime")
        return mark(case((long, times), otherwise=days), "moment")
    return mark(_shifted(base, parts, form), form)


def _form(base: exp.Expression, parts: list[Part], context: Context) -> str:
    if context.dialect == "postgres" or any(part.unit == "seconds" for part in parts):
        return "datetime"
    known = moment_of(base)
    kind = known[1] if known is not None else kind_of(base, context)
    return kind if kind in ("date", "datetime") else "moment"


def _shift_literal(when: datetime.datetime, unit: str, amount: int) -> datetime.datetime:
    try:
        if unit == "months":
            month = when.year * 12 + when.month - 1 + amount
            year, month = month // 12, month % 12 + 1
            return when.replace(
                year=year, month=month, day=min(when.day, calendar.monthrange(year, month)[1])
            )
        return when + datetime.timedelta(**{unit: amount})
    except (ValueError, OverflowError) as error:
        raise Untranslatable("a date outside the years 1 to 9999 has no counterpart in SQLite") from error


def _shifted(base: exp.Expression, parts: list[Part], form: str) -> exp.Expression:
    months = [_modifier(part) for part in parts if part.unit == "months"]
    others = [_modifier(part) for part in parts if part.unit != "months"]
    name = "DATE" if form == "date" else "DATETIME"
    if not months:
        return call(name, base, *others)
    last_day = call("DATE", base, text("start of month"), *months, text("+1 month"), text("-1 day"))
    day = call("MIN", call("DATE", base, *months), last_day)
    if form == "datetime":
        day = join_text([day, call("STRFTIME", text(" %H:%M:%S"), base)])
    return call(name, day, *others) if others else day


def _modifier(part: Part) -> exp.Expression:
    if isinstance(part.amount, int):
        return text(f"{part.amount:+d} {part.unit}")
    amount = part.amount
    if part.factor != 1:
        amount = binary(exp.Mul, amount, number(part.factor))
    return exp.DPipe(this=atom(amount), expression=text(f" {part.unit}"))
