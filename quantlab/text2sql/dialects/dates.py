"""Functions of dates by name: arithmetic, truncation, conversion.

What a value's type is, where no schema tells, `looks_temporal` guesses from a column's name; only differences and sums
with plain numbers rest on that.
"""

from __future__ import annotations

import datetime

from sqlglot import exp

from quantlab.text2sql.dialects.fields import (
    as_date,
    as_datetime,
    days_between,
    field_of,
    integer_part,
    iso_week,
    now,
    quarter,
    seconds_between,
    time_now,
    today,
    week,
    whole_months,
)
from quantlab.text2sql.dialects.handlers import Handler, Table
from quantlab.text2sql.dialects.intervals import Part, amount_part, interval_parts, negated, shift, unit_of
from quantlab.text2sql.dialects.nodes import (
    TEMPORAL,
    Context,
    Untranslatable,
    bare,
    binary,
    call,
    cast,
    join_text,
    kind_of,
    mark,
    moment,
    moment_of,
    number,
    quotient,
    string_of,
    text,
)

_TIME_WORDS = frozenset({"at", "time", "timestamp", "datetime"})
_DATE_WORDS = frozenset({"on", "date", "day", "dob", "birth", "birthday"})
_ONE_OF_ITS_ARGUMENTS = frozenset({"MIN", "MAX", "COALESCE", "LAG", "LEAD", "FIRST_VALUE", "LAST_VALUE"})


def _timestampdiff(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    unit, earlier, later = unit_of(arguments[0].name), arguments[1], arguments[2]
    if unit in ("YEAR", "QUARTER", "MONTH"):
        divisor = {"YEAR": 12, "QUARTER": 3, "MONTH": 1}[unit]
        whole = whole_months(earlier, later)
    else:
        divisor = {"WEEK": 604800, "DAY": 86400, "HOUR": 3600, "MINUTE": 60, "SECOND": 1}[unit]
        whole = seconds_between(earlier, later)
    if divisor == 1:
        return whole
    return quotient(whole, number(divisor))


def _date_trunc(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    unit = string_of(arguments[0])
    if unit is None:
        raise Untranslatable("DATE_TRUNC with a unit that is no literal has no counterpart in SQLite")
    unit, value = unit.lower(), arguments[1]
    forms = {
        "year": "%Y-01-01 00:00:00", "month": "%Y-%m-01 00:00:00", "day": "%Y-%m-%d 00:00:00",
        "hour": "%Y-%m-%d %H:00:00", "minute": "%Y-%m-%d %H:%M:00", "second": "%Y-%m-%d %H:%M:%S",
    }  # fmt: skip
    known = moment_of(value)
    if unit in forms and known is not None:
        when = datetime.datetime.strptime(known[0].strftime(forms[unit]), "%Y-%m-%d %H:%M:%S")
        return moment(when, "datetime")
    if unit in forms:
        return mark(call("STRFTIME", text(forms[unit]), value), "datetime")
    if unit == "week":
        monday = call("DATETIME", value, text("start of day"), text("weekday 0"), text("-6 days"))
        return mark(monday, "datetime")
    if unit == "quarter":
        at = binary(exp.Sub, binary(exp.Mul, integer_part("%m", value), number(2)), number(1))
        month = call("SUBSTR", text("010101040404070707101010"), at, number(2))
        parts = [call("STRFTIME", text("%Y-"), value), month, text("-01 00:00:00")]
        return mark(join_text(parts), "datetime")
    raise Untranslatable(f"the function DATE_TRUNC with unit {unit!r} has no counterpart in SQLite")


def _add_date(sign: int) -> Handler:
    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        amount = bare(arguments[1])
        if isinstance(amount, exp.Interval):
            parts = interval_parts(amount)
        else:
            parts = [amount_part(arguments[1], "DAY")]
        return shift(arguments[0], parts if sign > 0 else negated(parts), context)

    return handler


def _timestampadd(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    return shift(arguments[2], [amount_part(arguments[1], arguments[0].name)], context)


def _last_day(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    known = moment_of(arguments[0])
    if known is not None:
        first = moment(known[0].replace(day=1), "date")
        return shift(first, [Part("months", 1), Part("days", -1)], Context("mysql", context.clock))
    return mark(call("DATE", arguments[0], *map(text, ("start of month", "+1 month", "-1 day"))), "date")


def _part(form: str, add: int = 0, modulus: int = 0) -> Handler:
    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        found = integer_part(form, arguments[0])
        if add:
            found = binary(exp.Add, found, number(add))
        return binary(exp.Mod, found, number(modulus)) if modulus else found

    return handler


def _age(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    whole = arguments if len(arguments) == 2 else [today(context), *arguments]
    return exp.Anonymous(this="AGE", expressions=whole)


def _make_interval(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    if len(arguments) != 1 or not isinstance(arguments[0], exp.Kwarg):
        raise Untranslatable("MAKE_INTERVAL with more than one unit has no counterpart in SQLite")
    return exp.Interval(this=arguments[0].expression, unit=exp.var(arguments[0].this.name))


def _unix_timestamp(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    return integer_part("%s", arguments[0] if arguments else now(context))


def _from_unix(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    return mark(call("DATETIME", arguments[0], text("unixepoch")), "datetime")


def looks_temporal(node: exp.Expression, context: Context) -> str | None:
    """The temporal kind of a value: known, or guessed from a column's name where no schema tells."""
    kind = kind_of(node, context)
    if kind is not None:
        return kind if kind in TEMPORAL else None
    column = bare(node)
    while isinstance(column, exp.Anonymous | exp.Window | exp.Filter | exp.Subquery | exp.Select):
        if isinstance(column, exp.Anonymous) and column.name not in _ONE_OF_ITS_ARGUMENTS:
            return None
        inner = column.expressions[:1] if isinstance(column, exp.Anonymous | exp.Select) else [column.this]
        if not inner:
            return None
        column = bare(inner[0].unalias())
    if not isinstance(column, exp.Column) or context.typed:
        return None
    name = column.name.lower()
    last = name.rpartition("_")[2]
    if last in _TIME_WORDS or name.endswith(("time", "timestamp", "일시", "시각")):
        return "datetime"
    return "date" if last in _DATE_WORDS or name.endswith(("date", "일자", "날짜", "일")) else None


def _days_to(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """TO_DAYS: days since the year 0."""
    first = exp.Literal.number("1721059.5")
    return mark(
        cast(exp.Sub(this=call("JULIANDAY", as_date(arguments[0])), expression=first), "INTEGER"), "integer"
    )


_ONE, _TWO, _THREE = range(1, 2), range(2, 3), range(3, 4)
_COMMON: Table = {
    **{name: (range(0, 2), lambda arguments, context: now(context)) for name in
       ("NOW", "CURRENT_TIMESTAMP", "LOCALTIMESTAMP")},
    "CURRENT_DATE": (range(0, 1), lambda arguments, context: today(context)),
    "CURRENT_TIME": (range(0, 2), lambda arguments, context: time_now(context)),
    "DATE": (_ONE, lambda arguments, context: as_date(arguments[0])),
    "TIMESTAMP": (_ONE, lambda arguments, context: as_datetime(arguments[0])),
    "TIME": (_ONE, lambda arguments, context: mark(call("TIME", arguments[0]), "time")),
}  # fmt: skip
_MYSQL: Table = {
    **dict.fromkeys(("SYSDATE", "UTC_TIMESTAMP", "LOCALTIME"), _COMMON["NOW"]),
    "CURDATE": _COMMON["CURRENT_DATE"], "UTC_DATE": _COMMON["CURRENT_DATE"], "CURTIME": _COMMON["CURRENT_TIME"],
    "DATE_ADD": (_TWO, _add_date(1)), "ADDDATE": (_TWO, _add_date(1)), "DATE_SUB": (_TWO, _add_date(-1)),
    "SUBDATE": (_TWO, _add_date(-1)), "TIMESTAMPADD": (_THREE, _timestampadd),
    "TIMESTAMPDIFF": (_THREE, _timestampdiff),
    "DATEDIFF": (_TWO, lambda arguments, context: days_between(arguments[1], arguments[0], context)),
    "LAST_DAY": (_ONE, _last_day), "YEAR": (_ONE, _part("%Y")), "MONTH": (_ONE, _part("%m")),
    "DAY": (_ONE, _part("%d")),
    "DAYOFMONTH": (_ONE, _part("%d")), "DAYOFYEAR": (_ONE, _part("%j")), "DAYOFWEEK": (_ONE, _part("%w", add=1)),
    "WEEKDAY": (_ONE, _part("%w", add=6, modulus=7)), "HOUR": (_ONE, _part("%H")), "MINUTE": (_ONE, _part("%M")),
    "SECOND": (_ONE, _part("%S")), "QUARTER": (_ONE, lambda arguments, context: quarter(arguments[0])),
    "WEEK": (range(1, 3), week), "WEEKOFYEAR": (_ONE, lambda arguments, context: iso_week(arguments[0])),
    "TO_DAYS": (_ONE, _days_to), "UNIX_TIMESTAMP": (range(0, 2), _unix_timestamp), "FROM_UNIXTIME": (_ONE, _from_unix),
}  # fmt: skip
_POSTGRES: Table = {
    **dict.fromkeys(("CLOCK_TIMESTAMP", "STATEMENT_TIMESTAMP", "TRANSACTION_TIMESTAMP"), _COMMON["NOW"]),
    "DATE_TRUNC": (_TWO, _date_trunc), "AGE": (range(1, 3), _age), "MAKE_INTERVAL": (range(1, 8), _make_interval),
    "DATE_PART": (_TWO, lambda arguments, context: field_of(string_of(arguments[0]) or "?", arguments[1], context)),
}  # fmt: skip
FUNCTIONS: dict[str, Table] = {"mysql": {**_COMMON, **_MYSQL}, "postgres": {**_COMMON, **_POSTGRES}}
