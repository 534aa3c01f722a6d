"""DATE_FORMAT and TO_CHAR of dates, STR_TO_DATE and TO_DATE: formats in pieces, each a STRFTIME or a lookup.

Names of months and days are English. TO_CHAR of numbers, ordinals (1st, 2nd), Roman numerals, weeks that start on
Sunday and fractions of a second are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from sqlglot import exp

from quantlab.text2sql.dialects.fields import (
    as_date,
    as_datetime,
    integer_part,
    iso_week,
    iso_weekday,
    quarter,
)
from quantlab.text2sql.dialects.handlers import Handler, Table
from quantlab.text2sql.dialects.nodes import (
    NUMBERS,
    Context,
    Untranslatable,
    binary,
    call,
    cast,
    join_text,
    kind_of,
    mark,
    number,
    quotient,
    string_of,
    text,
)

_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip
_DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_HOURS = "".join(f"{hour % 12 or 12:02d}" for hour in range(24))

Value: TypeAlias = exp.Expression
Maker: TypeAlias = Callable[[Value], Value]
Piece: TypeAlias = str | Maker  # a STRFTIME form, or what makes the text


def _looked_up(row: str, width: int, position: Value) -> Value:
    """The entry at `position` (from 0) of a row of entries of equal width; NULL for NULL."""
    start = binary(exp.Add, binary(exp.Mul, position, number(width)), number(1))
    return call("SUBSTR", text(row), start, number(width))


def _month(value: Value) -> Value:
    return binary(exp.Sub, integer_part("%m", value), number(1))


def _names(names: tuple[str, ...], position: Maker, width: int) -> Maker:
    """The names, cut or filled with blanks to `width`."""
    row = "".join(name[:width].ljust(width) for name in names)
    return lambda value: _looked_up(row, width, position(value))


def _weekday(value: Value) -> Value:
    return integer_part("%w", value)


def _plain(form: str) -> Maker:
    """A number without leading zeros."""
    return lambda value: cast(integer_part(form, value), "TEXT")


def _hour12(value: Value) -> Value:
    return _looked_up(_HOURS, 2, integer_part("%H", value))


def _plain_hour12(value: Value) -> Value:
    return cast(cast(_hour12(value), "INTEGER"), "TEXT")


def _half(names: str) -> Maker:
    def make(value: Value) -> Value:
        half = quotient(integer_part("%H", value), number(12))
        return _looked_up(names, 2, half)

    return make


def _short_year(value: Value) -> Value:
    return call("SUBSTR", call("STRFTIME", text("%Y"), value), number(3), number(2))


def _iso_year(value: Value) -> Value:
    return call("STRFTIME", text("%Y"), call("DATE", value, text("-3 days"), text("weekday 4")))


def _iso_week(value: Value) -> Value:
    return call("SUBSTR", join_text([text("0"), iso_week(value)]), number(-2))


def _text_of(make: Maker) -> Maker:
    return lambda value: cast(make(value), "TEXT")


def _changed(name: str, make: Maker) -> Maker:
    return lambda value: call(name, make(value))


_MONTH, _MON = _names(_MONTHS, _month, 9), _names(_MONTHS, _month, 3)
_DAY, _DY = _names(_DAYS, _weekday, 9), _names(_DAYS, _weekday, 3)
_MYSQL: dict[str, Piece] = {
    "Y": "%Y", "m": "%m", "d": "%d", "H": "%H", "i": "%M", "s": "%S", "S": "%S", "j": "%j", "T": "%H:%M:%S", "w": "%w",
    "y": _short_year, "c": _plain("%m"), "e": _plain("%d"), "k": _plain("%H"), "h": _hour12, "I": _hour12,
    "l": _plain_hour12, "p": _half("AMPM"), "M": _changed("RTRIM", _MONTH), "b": _MON, "W": _changed("RTRIM", _DAY),
    "a": _DY, "x": _iso_year, "v": _iso_week,
}  # fmt: skip
_POSTGRES: dict[str, Piece] = {
    "YYYY": "%Y", "IYYY": _iso_year, "YY": _short_year, "MM": "%m", "DDD": "%j", "DD": "%d", "HH24": "%H",
    "HH12": _hour12, "HH": _hour12, "MI": "%M", "SS": "%S", "IW": _iso_week, "Q": _text_of(quarter),
    "D": _text_of(lambda value: binary(exp.Add, _weekday(value), number(1))), "ID": _text_of(iso_weekday),
    "AM": _half("AMPM"), "PM": _half("AMPM"), "am": _half("ampm"), "pm": _half("ampm"),
    "Month": _MONTH, "Mon": _MON, "Day": _DAY, "Dy": _DY,
    "MONTH": _changed("UPPER", _MONTH), "MON": _changed("UPPER", _MON), "DAY": _changed("UPPER", _DAY),
    "DY": _changed("UPPER", _DY), "month": _changed("LOWER", _MONTH), "mon": _changed("LOWER", _MON),
    "day": _changed("LOWER", _DAY), "dy": _changed("LOWER", _DY),
}  # fmt: skip
# With FM in front: no blanks, no zeros.
_POSTGRES_PLAIN: dict[str, Maker] = {
    "MM": _plain("%m"), "DD": _plain("%d"), "DDD": _plain("%j"), "HH24": _plain("%H"), "HH12": _plain_hour12,
    "HH": _plain_hour12, "MI": _plain("%M"), "SS": _plain("%S"),
}  # fmt: skip
_POSTGRES_TOKEN = re.compile(
    r'(FM)?(?:"([^"]*)"|(' + "|".join(sorted(_POSTGRES, key=len, reverse=True)) + r")(TH|th)?)"
)


def date_format(arguments: list[Value], context: Context) -> Value:
    """MySQL's DATE_FORMAT."""
    form = _literal(arguments[1], "DATE_FORMAT")
    pieces: list[Piece] = []
    at = 0
    while at < len(form):
        if form[at] != "%" or at + 1 == len(form):
            pieces.append(form[at].replace("%", "%%"))
            at += 1
            continue
        code = form[at + 1]
        if code == "r":
            pieces += [_hour12, ":%M:%S ", _half("AMPM")]
        elif code in _MYSQL:
            pieces.append(_MYSQL[code])
        elif code in "DfUuVX":
            raise Untranslatable(f"DATE_FORMAT with %{code} has no counterpart in SQLite")
        else:
            pieces.append(code.replace("%", "%%"))
        at += 2
    return _written(arguments[0], pieces)


def to_char(arguments: list[Value], context: Context) -> Value:
    """PostgreSQL's TO_CHAR of a date or time."""
    form = _literal(arguments[1], "TO_CHAR")
    if re.search(r"[90]", re.sub(r'"[^"]*"', "", form)) or kind_of(arguments[0], context) in NUMBERS:
        raise Untranslatable("TO_CHAR of a number has no counterpart in SQLite")
    pieces: list[Piece] = []
    at = 0
    while at < len(form):
        match = _POSTGRES_TOKEN.match(form, at)
        if match is None:
            if form[at].isascii() and form[at].isalpha():
                raise Untranslatable(f"TO_CHAR with {form[at : at + 6]!r} has no counterpart in SQLite")
            pieces.append(form[at].replace("%", "%%"))
            at += 1
            continue
        plain, quoted, word, ordinal = match.groups()
        at = match.end()
        if ordinal:
            raise Untranslatable("TO_CHAR with TH has no counterpart in SQLite")
        pieces.append(quoted.replace("%", "%%") if quoted is not None else _postgres_piece(word, bool(plain)))
    return _written(arguments[0], pieces)


def _postgres_piece(word: str, plain: bool) -> Piece:
    piece = _POSTGRES[word]
    if not plain:
        return piece
    if word in _POSTGRES_PLAIN:
        return _POSTGRES_PLAIN[word]
    if callable(piece):
        return lambda value: call("RTRIM", piece(value))
    return piece


def _written(value: Value, pieces: list[Piece]) -> Value:
    """The pieces, neighbouring STRFTIME forms as one, joined by ||."""
    parts: list[Value] = []
    form = ""
    for piece in [*pieces, None]:
        if isinstance(piece, str):
            form += piece
            continue
        if form:
            parts.append(call("STRFTIME", text(form), value))
            form = ""
        if piece is not None:
            parts.append(piece(value))
    return mark(join_text(parts) if parts else text(""), "text")


def _literal(node: Value, name: str) -> str:
    form = string_of(node)
    if form is None:
        raise Untranslatable(f"{name} with a format that is no literal has no counterpart in SQLite")
    return form


def parse_date(arguments: list[Value], context: Context) -> Value:
    """STR_TO_DATE, TO_DATE and TO_TIMESTAMP of text in the form that SQLite writes."""
    form = _literal(arguments[1], "STR_TO_DATE").strip()
    if form in ("%Y-%m-%d", "YYYY-MM-DD", "yyyy-mm-dd"):
        return as_date(arguments[0])
    if form in ("%Y-%m-%d %H:%i:%s", "%Y-%m-%d %T", "YYYY-MM-DD HH24:MI:SS", "yyyy-mm-dd hh24:mi:ss"):
        return as_datetime(arguments[0])
    raise Untranslatable(f"a date in the form {form!r} cannot be read by SQLite")


def _to_timestamp(arguments: list[Value], context: Context) -> Value:
    if len(arguments) == 1:
        return mark(call("DATETIME", arguments[0], text("unixepoch")), "datetime")
    return mark(as_datetime(parse_date(arguments, context)), "datetime")


def _named(make: Maker) -> Handler:
    return lambda arguments, context: mark(call("RTRIM", make(arguments[0])), "text")


_MYSQL_FUNCTIONS: Table = {
    "DATE_FORMAT": (range(2, 3), date_format), "STR_TO_DATE": (range(2, 3), parse_date),
    "MONTHNAME": (range(1, 2), _named(_MONTH)), "DAYNAME": (range(1, 2), _named(_DAY)),
}  # fmt: skip
_POSTGRES_FUNCTIONS: Table = {
    "TO_CHAR": (range(2, 3), to_char), "TO_DATE": (range(2, 3), parse_date),
    "TO_TIMESTAMP": (range(1, 3), _to_timestamp),
}  # fmt: skip
FUNCTIONS: dict[str, Table] = {"mysql": _MYSQL_FUNCTIONS, "postgres": _POSTGRES_FUNCTIONS}
