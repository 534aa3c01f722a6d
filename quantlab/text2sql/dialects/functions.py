"""Functions on numbers, conditions, aggregates and window functions.

A function that is listed by its name alone means the same in SQLite. Binary floating point stands in for decimals, so
ROUND(1.005, 2) is what a DOUBLE would give.
"""

from __future__ import annotations

from sqlglot import exp

from quantlab.text2sql.dialects.handlers import (
    SEVERAL,
    Handler,
    Table,
    common_kind,
    like_its_arguments,
    refused,
    same,
)
from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    Context,
    Untranslatable,
    atom,
    bare,
    binary,
    call,
    case,
    cast,
    integer_of,
    kind_of,
    mark,
    number,
    quotient,
)


def _extreme(name: str) -> Handler:
    """GREATEST and LEAST: NULL if any value is, in MySQL; PostgreSQL leaves NULLs out."""

    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        if len(arguments) == 1:
            return arguments[0]
        values = arguments
        if context.dialect == "postgres":
            values = [call("COALESCE", *arguments[at:], *arguments[:at]) for at in range(len(arguments))]
        return common_kind(call(name, *values), arguments, context)

    return handler


def _field(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """FIELD(x, a, b, …): where x stands among the others."""
    branches = [
        (exp.EQ(this=atom(arguments[0]), expression=atom(value)), number(at))
        for at, value in enumerate(arguments[1:], start=1)
    ]
    return case(*branches, otherwise=number(0))


def conditional(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """IF(condition, then, otherwise)."""
    return common_kind(case((arguments[0], arguments[1]), otherwise=arguments[2]), arguments[1:], context)


def rounded(value: exp.Expression, context: Context) -> exp.Expression:
    """To an integer. Halves go away from zero, those of PostgreSQL's DOUBLE PRECISION to the even neighbour."""
    found = call("ROUND", value)
    if context.dialect != "postgres" or kind_of(value, context) != "double":
        return mark(found, "real")
    is_half = exp.EQ(
        this=call("ABS", binary(exp.Sub, value, cast(value, "INTEGER"))), expression=exp.Literal.number("0.5")
    )
    is_odd = exp.NEQ(this=binary(exp.Mod, cast(found, "INTEGER"), number(2)), expression=number(0))
    back = binary(exp.Mul, exp.Paren(this=exp.And(this=is_half, expression=is_odd)), call("SIGN", value))
    return mark(binary(exp.Sub, found, back), "double")


def _round(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """SQLite's ROUND knows no digits before the point."""
    if len(arguments) == 1:
        return rounded(arguments[0], context)
    digits = integer_of(arguments[1])
    if digits is None:
        raise Untranslatable("ROUND to a number of digits that is no literal has no counterpart in SQLite")
    if digits >= 0:
        return mark(call("ROUND", *arguments), "real")
    power = exp.Literal.number(f"{10**-digits}.0")
    scaled = call("ROUND", quotient(arguments[0], power))
    return mark(binary(exp.Mul, scaled, power), "real")


def _truncate(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """Towards zero. Digits behind the point are cut after rounding to nine more, which undoes binary fractions."""
    digits = integer_of(arguments[1]) if len(arguments) > 1 else 0
    if digits is None or not 0 <= digits <= 6:
        raise Untranslatable("the function TRUNCATE has no counterpart in SQLite but for 0 to 6 digits")
    if digits == 0:
        return mark(cast(arguments[0], "INTEGER"), "numeric")
    power = exp.Literal.number(f"{10**digits}.0")
    scaled = call("ROUND", exp.Mul(this=atom(arguments[0]), expression=power), number(9 - digits))
    return mark(quotient(cast(scaled, "INTEGER"), power), "real")


def _floor(up: bool) -> Handler:
    """Not every SQLite has FLOOR and CEIL: the integer part, one less (or more) where that cut the wrong way."""

    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        value, whole = atom(arguments[0]), cast(arguments[0], "INTEGER")
        over = exp.Paren(this=(exp.GT if up else exp.LT)(this=value, expression=whole.copy()))
        return mark(binary(exp.Add if up else exp.Sub, whole, over), "numeric")

    return handler


def modulo(left: exp.Expression, right: exp.Expression, context: Context) -> exp.Expression:
    """The remainder with the sign of `left`, of fractions too: SQLite's % cuts its operands to integers."""
    if all(integer_of(side) is not None or kind_of(side, context) == "integer" for side in (left, right)):
        return binary(exp.Mod, left, right)
    return binary(exp.Sub, left, binary(exp.Mul, right, integer_division(left, right)))


def integer_division(left: exp.Expression, right: exp.Expression) -> exp.Expression:
    """Towards zero, of fractions too."""
    return cast(bare(quotient(cast(left, "REAL"), right)), "INTEGER")


def _count_of(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    first = arguments[0]
    if isinstance(first, exp.Distinct):
        inner = first.expressions
        if len(inner) > 1 or isinstance(inner[0], exp.Tuple):
            raise Untranslatable("COUNT(DISTINCT …) of several columns has no counterpart in SQLite")
    if len(arguments) != 1:
        raise Untranslatable("COUNT of several values has no counterpart in SQLite")
    return mark(exp.Anonymous(this="COUNT", expressions=arguments), "integer")


def _sum(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    kind = kind_of(arguments[0], context)
    return mark(
        exp.Anonymous(this="SUM", expressions=arguments),
        str(kind) if kind in NUMBERS else "number",
    )


def _average(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    kind = "double" if kind_of(arguments[0], context) == "double" else "real"
    return mark(exp.Anonymous(this="AVG", expressions=arguments), kind)


def _log(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """LOG(x) is natural in MySQL, decimal in PostgreSQL and SQLite."""
    natural = context.dialect == "mysql" and len(arguments) == 1
    return mark(exp.Anonymous(this="LN" if natural else "LOG", expressions=arguments), "real")


def _is_null(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    return exp.Paren(this=exp.Is(this=atom(arguments[0]), expression=exp.Null()))


def _nvl2(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    given = exp.Not(this=exp.Is(this=atom(arguments[0]), expression=exp.Null()))
    return common_kind(case((given, arguments[1]), otherwise=arguments[2]), arguments[1:], context)


_ONE, _TWO, _THREE = range(1, 2), range(2, 3), range(3, 4)
_COMMON: Table = {
    "ABS": (_ONE, like_its_arguments("ABS")), "SIGN": (_ONE, same("SIGN", "numeric")), "ROUND": (range(1, 3), _round),
    "FLOOR": (_ONE, _floor(False)), "CEIL": (_ONE, _floor(True)), "CEILING": (_ONE, _floor(True)),
    "MOD": (_TWO, lambda arguments, context: modulo(arguments[0], arguments[1], context)),
    "POWER": (_TWO, same("POWER", "real")), "POW": (_TWO, same("POWER", "real")), "LOG": (range(1, 3), _log),
    **{name: (_ONE, same(name, "real")) for name in
       ("SQRT", "EXP", "LN", "LOG10", "RADIANS", "DEGREES", "SIN", "COS", "TAN", "ASIN", "ACOS", "ATAN")},
    "ATAN2": (_TWO, same("ATAN2", "real")), "PI": (range(0, 1), same("PI", "real")),
    "COALESCE": (SEVERAL, like_its_arguments("COALESCE")), "NULLIF": (_TWO, same("NULLIF")),
    "NVL": (_TWO, like_its_arguments("COALESCE")), "NVL2": (_THREE, _nvl2),
    "GREATEST": (SEVERAL, _extreme("MAX")), "LEAST": (SEVERAL, _extreme("MIN")),
    "COUNT": (SEVERAL, _count_of), "SUM": (_ONE, _sum), "AVG": (_ONE, _average),
    "MIN": (_ONE, like_its_arguments("MIN")), "MAX": (_ONE, like_its_arguments("MAX")),
    "ANY_VALUE": (_ONE, like_its_arguments("MAX")),  # any of them will do
    **{name: (range(0, 1), same(name, "integer")) for name in ("ROW_NUMBER", "RANK", "DENSE_RANK")},
    "PERCENT_RANK": (range(0, 1), same("PERCENT_RANK", "real")), "CUME_DIST": (range(0, 1), same("CUME_DIST", "real")),
    "NTILE": (_ONE, same("NTILE", "integer")), "NTH_VALUE": (_TWO, same("NTH_VALUE")),
    **{name: (range(1, 4), like_its_arguments(name)) for name in ("LAG", "LEAD")},
    **{name: (_ONE, like_its_arguments(name)) for name in ("FIRST_VALUE", "LAST_VALUE")},
    **{name: (range(0, 10), refused(f"the result of {name} is random")) for name in ("RAND", "RANDOM", "UUID")},
}  # fmt: skip
_MYSQL: Table = {
    "TRUNCATE": (_TWO, _truncate), "IFNULL": (_TWO, like_its_arguments("COALESCE")), "ISNULL": (_ONE, _is_null),
    "IF": (_THREE, conditional), "FIELD": (range(2, 100), _field), "LOG2": (_ONE, same("LOG2", "real")),
}  # fmt: skip
_POSTGRES: Table = {
    "TRUNC": (range(1, 3), _truncate), "BOOL_AND": (_ONE, same("MIN", "boolean")),
    "EVERY": (_ONE, same("MIN", "boolean")), "BOOL_OR": (_ONE, same("MAX", "boolean")),
}  # fmt: skip
FUNCTIONS: dict[str, Table] = {"mysql": {**_COMMON, **_MYSQL}, "postgres": {**_COMMON, **_POSTGRES}}
