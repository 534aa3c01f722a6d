"""Parts of moments and what lies between two of them: EXTRACT, differences, the clock.

Dates are text in SQLite ('2024-07-01', '2024-07-01 12:00:00'), and its functions read no other form; a fraction of a
second is lost. The time zone is UTC everywhere. Weeks: MySQL's WEEK(d) counts from the first Sunday (mode 0), every
other week here is ISO's.
"""

from __future__ import annotations

from sqlglot import exp

from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    Context,
    Untranslatable,
    bare,
    binary,
    call,
    case,
    cast,
    integer_of,
    kind_of,
    mark,
    moment,
    moment_of,
    number,
    quotient,
    text,
)

DIFFERENCE = "TIME DIFFERENCE"  # of two timestamps: an interval, which only EXTRACT and comparisons can use
_ISO_THURSDAY = ("-3 days", "weekday 4")  # the Thursday of the same ISO week, which names its year


def today(context: Context) -> exp.Expression:
    return moment(context.clock, "date")


def now(context: Context) -> exp.Expression:
    return moment(context.clock, "datetime")


def time_now(context: Context) -> exp.Expression:
    return mark(text(context.clock.strftime("%H:%M:%S")), "time")


def integer_part(form: str, value: exp.Expression) -> exp.Expression:
    """What STRFTIME writes, as an integer."""
    return cast(call("STRFTIME", text(form), value), "INTEGER")


def as_date(value: exp.Expression) -> exp.Expression:
    """The day of a moment."""
    known = moment_of(value)
    if known is not None:
        return moment(known[0], "date")
    return mark(call("DATE", value), "date")


def as_datetime(value: exp.Expression) -> exp.Expression:
    known = moment_of(value)
    if known is not None:
        return moment(known[0], "datetime")
    return mark(call("DATETIME", value), "datetime")


def quarter(value: exp.Expression) -> exp.Expression:
    return quotient(binary(exp.Add, integer_part("%m", value), number(2)), number(3))


def iso_week(value: exp.Expression) -> exp.Expression:
    days = call("STRFTIME", text("%j"), call("DATE", value, *map(text, _ISO_THURSDAY)))
    weeks = quotient(binary(exp.Sub, cast(days, "INTEGER"), number(1)), number(7))
    return binary(exp.Add, weeks, number(1))


def iso_weekday(value: exp.Expression) -> exp.Expression:
    """1 for Monday to 7 for Sunday."""
    from_monday = binary(exp.Mod, binary(exp.Add, integer_part("%w", value), number(6)), number(7))
    return binary(exp.Add, from_monday, number(1))


def week(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """MySQL's WEEK: mode 0 (weeks from the first Sunday, 0 before it), and mode 3 (ISO)."""
    mode = integer_of(arguments[1]) if len(arguments) > 1 else 0
    if mode == 3:
        return iso_week(arguments[0])
    if mode != 0:
        raise Untranslatable(f"the function WEEK with mode {mode} has no counterpart in SQLite")
    day, weekday = integer_part("%j", arguments[0]), integer_part("%w", arguments[0])
    shifted = binary(exp.Sub, binary(exp.Add, day, number(6)), weekday)
    return quotient(shifted, number(7))


def field_of(name: str, value: exp.Expression, context: Context) -> exp.Expression:
    """EXTRACT(name FROM value): the field of a moment, an AGE or a difference."""
    field = name.upper()
    inner = bare(value)
    if isinstance(inner, exp.Anonymous) and inner.name == "AGE":
        found = _age_field(field, inner)
    elif isinstance(inner, exp.Anonymous) and inner.name == DIFFERENCE:
        found = _difference_field(field, inner)
    elif isinstance(inner, exp.Interval) or kind_of(value, context) in NUMBERS:
        raise Untranslatable(f"{field} of a number or of an interval has no counterpart in SQLite")
    else:
        found = _moment_field(field, value, context)
    return mark(found, "numeric") if context.dialect == "postgres" else found


def _moment_field(field: str, value: exp.Expression, context: Context) -> exp.Expression:
    forms = {
        "YEAR": "%Y", "MONTH": "%m", "DAY": "%d", "HOUR": "%H", "MINUTE": "%M", "SECOND": "%S", "DOY": "%j",
        "DOW": "%w", "EPOCH": "%s", "YEAR_MONTH": "%Y%m",
    }  # fmt: skip
    if field in forms or field.removesuffix("S") in forms:
        return integer_part(forms.get(field) or forms[field.removesuffix("S")], value)
    if field == "QUARTER":
        return quarter(value)
    if field == "WEEK":
        return iso_week(value) if context.dialect == "postgres" else week([value], context)
    if field == "ISODOW":
        return iso_weekday(value)
    if field == "ISOYEAR":
        return integer_part("%Y", call("DATE", value, *map(text, _ISO_THURSDAY)))
    if field == "DECADE":
        return quotient(integer_part("%Y", value), number(10))
    raise Untranslatable(f"EXTRACT of {field} has no counterpart in SQLite")


def _age_field(field: str, age: exp.Expression) -> exp.Expression:
    """Whole years and months of AGE(later, earlier)."""
    if field not in ("YEAR", "MONTH"):
        raise Untranslatable(f"{field} of AGE has no counterpart in SQLite")
    months = whole_months(age.expressions[1], age.expressions[0])
    if field == "YEAR":
        return quotient(months, number(12))
    return binary(exp.Mod, months, number(12))


def _difference_field(field: str, difference: exp.Expression) -> exp.Expression:
    seconds = seconds_between(difference.expressions[1], difference.expressions[0])
    steps = {
        "EPOCH": (0, 1),
        "DAY": (0, 86400),
        "HOUR": (86400, 3600),
        "MINUTE": (3600, 60),
        "SECOND": (60, 1),
    }
    if field not in steps:
        raise Untranslatable(f"{field} of a difference of two times has no counterpart in SQLite")
    modulus, divisor = steps[field]
    found = binary(exp.Mod, seconds, number(modulus)) if modulus else seconds
    if divisor == 1:
        return found
    return quotient(found, number(divisor))


def seconds_between(earlier: exp.Expression, later: exp.Expression) -> exp.Expression:
    return binary(exp.Sub, integer_part("%s", later), integer_part("%s", earlier))


def days_between(earlier: exp.Expression, later: exp.Expression, context: Context) -> exp.Expression:
    """Whole days between the dates of two moments."""
    left, right = moment_of(later), moment_of(earlier)
    if left is not None and right is not None:
        return number((left[0].date() - right[0].date()).days)
    days = [
        call("JULIANDAY", part if kind_of(part, context) == "date" else as_date(part))
        for part in (later, earlier)
    ]
    return cast(exp.Sub(this=days[0], expression=days[1]), "INTEGER")


def whole_months(earlier: exp.Expression, later: exp.Expression) -> exp.Expression:
    """Complete months from `earlier` to `later`, less than zero the other way round: a month is complete when its day
    and time of day are reached."""

    def count(start: exp.Expression, end: exp.Expression) -> exp.Expression:
        years = binary(exp.Sub, integer_part("%Y", end), integer_part("%Y", start))
        months = binary(exp.Sub, integer_part("%m", end), integer_part("%m", start))
        short = exp.Paren(
            this=exp.LT(
                this=call("STRFTIME", text("%d %H:%M:%S"), end),
                expression=call("STRFTIME", text("%d %H:%M:%S"), start),
            )
        )
        return binary(exp.Sub, binary(exp.Add, binary(exp.Mul, years, number(12)), months), short)

    forward = exp.GTE(this=call("DATETIME", later), expression=call("DATETIME", earlier))
    return exp.Paren(
        this=case((forward, count(earlier, later)), otherwise=exp.Neg(this=count(later, earlier)))
    )
