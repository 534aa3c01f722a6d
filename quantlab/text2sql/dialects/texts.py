"""Functions on text.

LENGTH counts bytes in MySQL and characters in PostgreSQL. Case is changed and compared for ASCII letters only.
"""

from __future__ import annotations

from sqlglot import exp

from quantlab.text2sql.dialects.handlers import SEVERAL, Handler, Table, same
from quantlab.text2sql.dialects.nodes import (
    Context,
    Untranslatable,
    atom,
    binary,
    call,
    case,
    cast,
    integer_of,
    join_text,
    kind_of,
    mark,
    number,
    string_of,
    text,
)


def _concat(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """MySQL's is NULL if any part is; PostgreSQL's leaves NULLs out."""
    if any(kind_of(part, context) == "boolean" for part in arguments) and context.dialect == "postgres":
        raise Untranslatable("CONCAT of a boolean has no counterpart in SQLite")
    if context.dialect == "postgres":
        arguments = [
            part if string_of(part) is not None else call("COALESCE", part, text("")) for part in arguments
        ]
    if len(arguments) == 1:
        return mark(cast(arguments[0], "TEXT"), "text")
    return join_text(arguments)


def _concat_ws(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """The parts that are not NULL, the separator between them."""
    separator, parts = arguments[0], arguments[1:]
    joined = join_text([call("COALESCE", join_text([separator, part]), text("")) for part in parts])
    start = binary(exp.Add, call("LENGTH", separator), number(1))
    return mark(call("SUBSTR", joined, start), "text")


def _octets(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    return mark(call("LENGTH", cast(cast(arguments[0], "TEXT"), "BLOB")), "integer")


def _length(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """MySQL counts bytes."""
    return (
        _octets(arguments, context)
        if context.dialect == "mysql"
        else mark(call("LENGTH", *arguments), "integer")
    )


def substring(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """SUBSTRING(text, start, length): the same for a start from 1; from the end only in MySQL."""
    start, length = integer_of(arguments[1]), integer_of(arguments[2]) if len(arguments) > 2 else 0
    if string_of(arguments[1]) is not None and start is None:
        raise Untranslatable("SUBSTRING by a regular expression has no counterpart in SQLite")
    if start is not None and (start == 0 or (start < 0 and context.dialect == "postgres")):
        raise Untranslatable(f"SUBSTRING from {start} has no counterpart in SQLite")
    if length is not None and length < 0:
        raise Untranslatable("SUBSTRING of a negative length has no counterpart in SQLite")
    found = mark(call("SUBSTR", *arguments), "text")
    if start is None or start > 0:
        return found
    # Before the beginning there is nothing in MySQL; SQLite would begin at the first character.
    inside = exp.GTE(this=call("LENGTH", arguments[0]), expression=number(-start))
    return mark(case((inside, found), otherwise=call("SUBSTR", arguments[0], number(1), number(0))), "text")


def _left(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    count = arguments[1] if context.dialect == "mysql" else _count(arguments[1], "LEFT")
    return mark(call("SUBSTR", arguments[0], number(1), count), "text")


def _right(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    count = _count(arguments[1], "RIGHT")
    if integer_of(count) == 0:
        return mark(call("SUBSTR", arguments[0], number(1), number(0)), "text")
    return mark(call("SUBSTR", arguments[0], exp.Neg(this=count)), "text")


def _count(node: exp.Expression, name: str) -> exp.Expression:
    """The literal number of characters that LEFT or RIGHT take; others may be negative, or zero."""
    count = integer_of(node)
    if count is None or count < 0:
        raise Untranslatable(
            f"{name} of a number of characters that is no plain number has no counterpart in SQLite"
        )
    return number(count)


def position(whole: exp.Expression, part: exp.Expression, context: Context) -> exp.Expression:
    """Where `part` begins; MySQL looks for it without case."""
    sides = [whole, part]
    if context.dialect == "mysql":
        sides = [
            text(found.lower()) if (found := string_of(side)) is not None else call("LOWER", side)
            for side in sides
        ]
    return mark(call("INSTR", *sides), "integer")


def _position(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """LOCATE(part, whole)."""
    return position(arguments[1], arguments[0], context)


def _pad(left: bool) -> Handler:
    def handler(arguments: list[exp.Expression], context: Context) -> exp.Expression:
        width, filler = integer_of(arguments[1]), string_of(arguments[2]) if len(arguments) > 2 else " "
        if width is None or not 0 < width <= 200 or filler is None or len(filler) != 1:
            name = "LPAD" if left else "RPAD"
            raise Untranslatable(
                f"the function {name} has no counterpart in SQLite unless width and one filler are given"
            )
        value, row = cast(arguments[0], "TEXT"), text(filler * width)
        padded = (
            call("SUBSTR", join_text([row, value]), number(-width))
            if left
            else call("SUBSTR", join_text([value, row]), number(1), number(width))
        )
        whole = exp.GTE(this=call("LENGTH", value), expression=number(width))
        return mark(case((whole, call("SUBSTR", value, number(1), number(width))), otherwise=padded), "text")

    return handler


def _first_part(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    """SUBSTRING_INDEX(text, separator, 1) and SPLIT_PART(text, separator, 1)."""
    if integer_of(arguments[2]) != 1:
        raise Untranslatable(
            "SUBSTRING_INDEX and SPLIT_PART have no counterpart in SQLite but for the first part"
        )
    value, separator = arguments[0], arguments[1]
    at = call("INSTR", value, separator)
    part = call("SUBSTR", value, number(1), binary(exp.Sub, at, number(1)))
    return mark(case((exp.GT(this=at, expression=number(0)), part), otherwise=value), "text")


def starts_with(arguments: list[exp.Expression], context: Context) -> exp.Expression:
    start = call("SUBSTR", arguments[0], number(1), call("LENGTH", arguments[1]))
    return exp.Paren(this=exp.EQ(this=start, expression=atom(arguments[1])))


_ONE, _TWO, _THREE = range(1, 2), range(2, 3), range(3, 4)
_COMMON: Table = {
    "CONCAT": (SEVERAL, _concat), "CONCAT_WS": (range(2, 100), _concat_ws),
    "LOWER": (_ONE, same("LOWER", "text")), "UPPER": (_ONE, same("UPPER", "text")),
    "LTRIM": (range(1, 3), same("LTRIM", "text")), "RTRIM": (range(1, 3), same("RTRIM", "text")),
    "REPLACE": (_THREE, same("REPLACE", "text")), "LENGTH": (_ONE, _length),
    "CHAR_LENGTH": (_ONE, same("LENGTH", "integer")), "CHARACTER_LENGTH": (_ONE, same("LENGTH", "integer")),
    "OCTET_LENGTH": (_ONE, _octets), "SUBSTR": (range(2, 4), substring), "SUBSTRING": (range(2, 4), substring),
    "LEFT": (_TWO, _left), "RIGHT": (_TWO, _right), "LPAD": (range(2, 4), _pad(True)),
    "RPAD": (range(2, 4), _pad(False)),
}  # fmt: skip
_MYSQL: Table = {
    "LCASE": _COMMON["LOWER"], "UCASE": _COMMON["UPPER"], "MID": _COMMON["SUBSTR"],
    "INSTR": (_TWO, lambda arguments, context: position(arguments[0], arguments[1], context)),
    "LOCATE": (_TWO, _position), "SUBSTRING_INDEX": (_THREE, _first_part),
}  # fmt: skip
_POSTGRES: Table = {
    "BTRIM": (range(1, 3), same("TRIM", "text")), "STRPOS": (_TWO, same("INSTR", "integer")),
    "SPLIT_PART": (_THREE, _first_part), "STARTS_WITH": (_TWO, starts_with),
}  # fmt: skip
FUNCTIONS: dict[str, Table] = {"mysql": {**_COMMON, **_MYSQL}, "postgres": {**_COMMON, **_POSTGRES}}
