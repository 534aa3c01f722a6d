"""Values worth having in a column: those a query names, and their neighbours on both sides of every boundary.

A number comes with one more and one less, a date with the day, month and year before and after, a year or a month with
its first and last day, a text with another case, a letter more and a letter less, a LIKE pattern with texts that match
it and texts that nearly do. Plain values fill up. What the schema rules out (CHECK, ENUM) is left out.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any

from quantlab.text2sql.schema.schema import Column

PLAIN_NUMBERS = (1, 2, 3, 5, 8, 13, 20, 35, 50, 77, 100)
EVEN_NUMBERS = (4, 8, 12, 16, 20)
PLAIN_TEXTS = ("가람", "나루", "Delta", "echo", "다솜", "fox", "Gold", "하늘", "iris", "Jade")
PLAIN_DATES = (
    "2021-03-05", "2022-07-15", "2022-07-16", "2023-01-31", "2023-06-15", "2023-11-30", "2024-01-01", "2024-05-20",
)  # fmt: skip
DATES = ("date", "datetime")
_DAY = re.compile(r"(\d{4})-(\d{2})-(\d{2})")
_MONTH = re.compile(r"(\d{4})-(\d{2})")


def pool(
    column: Column, kind: str, constants: Sequence[Any], *, averaged: bool = False
) -> tuple[list[Any], list[Any]]:
    """(values around the constants, plain values) for a column, both within what the schema allows, no NULL.

    The plain numbers of a column that is averaged are evenly spaced, so that some equal the average.
    """
    if column.choices is not None:
        return list(column.choices), []
    if kind == "boolean":
        return [0, 1], []
    if kind in ("integer", "real"):
        numbers = [number for value in constants if (number := as_number(value)) is not None]
        near = _around_numbers(numbers, whole=kind == "integer")
        plain: list[Any] = list(EVEN_NUMBERS if averaged else PLAIN_NUMBERS)
        if kind == "real":
            plain = [float(n) + 0.25 * (n % 4) for n in plain]
        near += [
            value for value in constants if as_number(value) is None and isinstance(value, str) and value
        ]
        bounds = [b for b in (column.low, column.high) if isinstance(b, int | float)]
        near += _around_numbers(bounds, whole=kind == "integer") if not near else []
        plain = [_into(value, column, kind) for value in plain]
    elif kind in DATES:
        near = [_with_time(day, kind) for value in constants for day in _around_date(str(value))]
        near += [
            str(v) for v in constants if len(str(v)) > 10 or (isinstance(v, str) and not v[:1].isdigit())
        ]
        plain = [_with_time(day, kind) for day in PLAIN_DATES]
    elif kind == "time":
        near = [text for value in constants for text in _around_text(str(value))[:2]]
        plain = ["00:00:00", "09:30:00", "12:00:00", "18:45:30", "23:59:59"]
    elif kind == "blob":
        near, plain = [], [b"\x00", b"\x01\x02", b"abc"]
    else:
        near = joined_patterns(constants) + [text for value in constants for text in _around_text(str(value))]
        plain = list(PLAIN_TEXTS)
    return _allowed(near, column), _allowed(plain, column)


def kind_of(column: Column, constants: Sequence[Any], dated: bool, numeric: bool) -> str:
    """The kind of values to make: what is declared, unless the query uses the column otherwise."""
    kind = column.kind
    if kind == "text" and (dated or (constants and all(_DAY.match(str(v)) for v in constants))):
        return "date"
    named_numbers = bool(constants) and all(isinstance(v, int | float) for v in constants)
    if kind == "text" and not column.declared and (numeric or named_numbers):
        return "integer"
    if kind == "integer" and any(isinstance(v, str) and _DAY.match(v) for v in constants):
        return "date"
    return kind


def as_number(value: Any) -> float | int | None:
    """A number, or text that is one."""
    if isinstance(value, int | float):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if number != number or abs(number) > 1e15:
        return None
    return int(number) if number == int(number) and "." not in str(value) else number


def _around_numbers(numbers: Iterable[float | int], whole: bool) -> list[Any]:
    found: list[Any] = []
    for number in numbers:
        if whole:
            base = int(number)
            found += [base, base - 1, base + 1, *([base + 2, base * 2] if base else [])]
        else:
            found += [float(number), number - 0.5, number + 0.5, number - 1, number + 1, number * 2]
    return found


def shifted(value: Any, distance: int) -> Any:
    """A number so much larger, a date so many days later; None for anything else."""
    if isinstance(value, int | float):
        return value + distance
    day = _DAY.match(value) if isinstance(value, str) else None
    base = _date(*(int(part) for part in day.groups())) if day is not None else None
    return _shift(base, distance) + value[10:] if base is not None else None


def _into(value: Any, column: Column, kind: str) -> Any:
    """A plain number moved between the column's bounds."""
    low = column.low if isinstance(column.low, int | float) else None
    high = column.high if isinstance(column.high, int | float) else None
    if low is None and high is None:
        return value
    if low is not None and high is not None and high > low:
        span = high - low
        moved = low + (value * 7919 % 100) / 100 * span
    else:
        moved = low + value if low is not None else (high or 0) - value
    return int(moved) if kind == "integer" else round(float(moved), 2)


def _around_date(text: str) -> list[str]:
    """Days at and beside what a text says: a day, a month, a year, or the number of a month, day or weekday."""
    day = _DAY.match(text)
    if day is not None:
        base = _date(*(int(part) for part in day.groups()))
        return [] if base is None else [_shift(base, days) for days in (0, -1, 1, -31, 31, -366, 366)]
    month = _MONTH.fullmatch(text)
    if month is not None:
        year, number = (int(part) for part in month.groups())
        if not 1 <= number <= 12:
            return []
        first = datetime.date(year, number, 1)
        after = _date(year + number // 12, number % 12 + 1, 1)
        last = _shift(after, -1) if after else first.isoformat()
        return [
            first.isoformat(),
            last,
            _shift(first, 14),
            _shift(first, -1),
            _shift(first, 33),
            _shift(first, 366),
        ]
    if not text.isdigit() or len(text) > 4:
        return []
    number = int(text)
    if 1000 <= number <= 9998:
        return [
            f"{number}-01-01",
            f"{number}-06-15",
            f"{number}-12-31",
            f"{number - 1}-12-31",
            f"{number + 1}-01-01",
        ]
    found = []
    if 1 <= number <= 12:
        found += [f"2023-{number:02d}-10", f"2022-{number:02d}-28", f"2023-{number % 12 + 1:02d}-10"]
    if 1 <= number <= 28:
        found += [f"2023-05-{number:02d}", f"2023-05-{number % 28 + 1:02d}"]
    if 0 <= number <= 6:  # 2023-10-01 is a Sunday, weekday 0
        found += [f"2023-10-{number + 1:02d}", f"2023-10-{number + 2:02d}"]
    return found


def _date(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None


def _shift(day: datetime.date, days: int) -> str:
    try:
        return (day + datetime.timedelta(days=days)).isoformat()
    except OverflowError:
        return day.isoformat()


def _with_time(day: str, kind: str) -> str:
    return f"{day} 00:00:00" if kind == "datetime" else day


def joined_patterns(constants: Sequence[Any]) -> list[str]:
    """A text for several LIKE patterns on one column at once: what they look for, one behind the other."""
    patterns = [str(value) for value in constants if isinstance(value, str) and "%" in value]
    wanted = [pattern.strip("%").replace("%", "와").replace("_", "o") for pattern in patterns]
    return [" ".join(wanted), " ".join(reversed(wanted))] if len(patterns) > 1 else []


def _around_text(text: str) -> list[str]:
    if "%" in text or "_" in text:
        plain = text.replace("%", "").replace("_", "o")
        found = [plain, plain + "나", "가" + plain, "가" + plain + "나", plain[:-1], plain[1:]]
        if text.count("%") > 1 and text.strip("%") != plain:
            found += [text.strip("%").replace("%", "와").replace("_", "o")]
    else:
        found = [text, text + "x", "x" + text, text[:-1]]
        if text.swapcase() != text:
            found += [text.swapcase()]
        number = as_number(text)
        if isinstance(number, int):
            found += [str(number + 1), str(number - 1)]
    return [part for part in found if part]


def _allowed(values: Iterable[Any], column: Column) -> list[Any]:
    """Each value once, none outside the column's bounds."""
    kept: list[Any] = []
    for value in values:
        if _outside(value, column.low, above=False) or _outside(value, column.high, above=True):
            continue
        if not any(type(old) is type(value) and old == value for old in kept):
            kept.append(value)
    return kept


def _outside(value: Any, bound: float | str | None, above: bool) -> bool:
    """Whether a value is beyond a bound of its own type."""
    if isinstance(bound, str):
        return isinstance(value, str) and (value > bound if above else value < bound)
    if bound is None or not isinstance(value, int | float):
        return False
    return value > bound if above else value < bound
