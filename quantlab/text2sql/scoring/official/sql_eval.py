"""The rule of defog's sql-eval, which compares two pandas data frames, written without pandas.

In the order of its `compare_query_results`, for one accepted gold:

1. The values are compared with numpy's `==` *before* their shapes are: whatever broadcasts is compared, so one
   gold row equals a hundred like it, one gold column a table full of it, and no rows equal any single row.
2. Both are normalised: duplicate rows go, columns are sorted by name, rows by all columns; when the question is one
   of order (its category is `order_by`, or it says order, sort or arrange), by the first expression of the query's
   ORDER BY and then all others, or left as they are without one. Then shapes and values must be equal.
3. Else the gold may be a part of the prediction: each gold column, its values sorted, must equal some predicted
   column within 1e-5 relative; those columns are normalised the same way (an order that counts is now the rows' own)
   and must be equal.

Where pandas raises (two columns of one name in a step that needs names, numbers and text in one sorted column), the
tool counts an error; here the answer is no. A number column with NULLs holds NaN, which equals nothing in steps 1
and 2, and a NaN in step 3. Integers compare exactly in step 3, as pandas does since 2.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.text2sql.scoring.order_by import Row

_ASKS_FOR_ORDER = re.compile(r"\b(order|sort|arrange)\b", re.IGNORECASE)
_ORDER_BY = re.compile(r"ORDER BY([^\n;,)]*)(?=[;,)]|\n?\Z)", re.IGNORECASE)
_NO_COLUMN = ("desc", "asc", "nulls", "last", "first", "limit")
RELATIVE, ABSOLUTE = 1e-5, 1e-8


class _Raised(Exception):
    """Where pandas raises."""


@dataclass(frozen=True)
class Frame:
    """A result as pandas holds it: NULL in a number column is NaN; `integer` says which columns stay integers."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    integer: tuple[bool, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    def take(self, order: Sequence[int], names: Sequence[str] | None = None) -> Frame:
        """These columns, in this order."""
        columns = tuple(names) if names is not None else tuple(self.columns[i] for i in order)
        rows = tuple(tuple(row[i] for i in order) for row in self.rows)
        return Frame(columns, rows, tuple(self.integer[i] for i in order))

    def with_rows(self, rows: Sequence[Row]) -> Frame:
        return Frame(self.columns, tuple(rows), self.integer)


def frames_agree(
    gold_columns: Sequence[str],
    gold_rows: Sequence[Row],
    predicted_columns: Sequence[str],
    predicted_rows: Sequence[Row],
    gold_sql: str,
    predicted_sql: str,
    question: str,
    category: str,
) -> bool:
    """sql-eval's `correct` for one gold."""
    gold, predicted = make_frame(gold_columns, gold_rows), make_frame(predicted_columns, predicted_rows)
    ordered = category == "order_by" or _ASKS_FOR_ORDER.search(question) is not None
    try:
        return (
            broadcast_equal(gold, predicted)
            or _normal_equal(gold, predicted, gold_sql, predicted_sql, ordered)
            or _is_part(gold, predicted, ordered)
        )
    except _Raised:
        return False


def make_frame(columns: Sequence[str], rows: Sequence[Row]) -> Frame:
    """A result as `pandas.read_sql_query` gives it."""
    numbers, integer = [], []
    for values in zip(*rows, strict=True) if rows else ((),) * len(columns):
        known = [value for value in values if value is not None]
        number = bool(known) and all(isinstance(value, int | float) for value in known)
        numbers.append(number)
        integer.append(
            number and len(known) == len(values) and all(isinstance(value, int) for value in known)
        )
    held = (
        tuple(
            math.nan if number and value is None else value
            for value, number in zip(row, numbers, strict=True)
        )
        for row in rows
    )
    return Frame(tuple(columns), tuple(held), tuple(integer))


def broadcast_equal(left: Frame, right: Frame) -> bool:
    """numpy's `(left == right).all()`: a side of length 1 is repeated; what cannot be repeated is not equal."""
    height, width = (_broadcast(one, two) for one, two in zip(left.shape, right.shape, strict=True))
    if height is None or width is None:
        return False
    return all(
        _at(left, row, column) == _at(right, row, column) for row in range(height) for column in range(width)
    )


def _broadcast(one: int, two: int) -> int | None:
    if one == two or two == 1:
        return one
    return two if one == 1 else None


def _at(frame: Frame, row: int, column: int) -> Any:
    height, width = frame.shape
    return frame.rows[row if height > 1 else 0][column if width > 1 else 0]


def _normal_equal(gold: Frame, predicted: Frame, gold_sql: str, predicted_sql: str, ordered: bool) -> bool:
    left, right = _normalize(gold, gold_sql, ordered), _normalize(predicted, predicted_sql, ordered)
    return left.shape == right.shape and broadcast_equal(left, right)


def _normalize(frame: Frame, sql: str | None, ordered: bool) -> Frame:
    distinct: dict[tuple[Any, ...], Row] = {}
    for row in frame.rows:
        distinct.setdefault(tuple(None if _missing(value) else value for value in row), row)
    frame = frame.with_rows(list(distinct.values()))
    twice = len(set(frame.columns)) < len(frame.columns)
    clause = re.search(r"ORDER BY[\s\S]*", sql, re.IGNORECASE) if sql and ordered else None
    if twice and (list(frame.columns) != sorted(frame.columns) or not ordered or clause is not None):
        raise _Raised  # "cannot reindex on an axis with duplicate labels", "the column label is not unique"
    frame = frame.take(sorted(range(len(frame.columns)), key=lambda i: frame.columns[i]))
    if not ordered:
        return _sort(frame, range(len(frame.columns)), descending=False)
    if clause is None:
        return frame
    names, descending = _order_columns(clause.group())
    chosen = [frame.columns.index(name) for name in names if name in frame.columns]
    others = [i for i, name in enumerate(frame.columns) if name not in names]
    if len(set(chosen)) < len(chosen):
        raise _Raised  # one column twice
    return _sort(frame, [*chosen, *others], descending).take([*others, *chosen])


def _order_columns(clause: str) -> tuple[list[str], bool]:
    """The words of the first ORDER BY expression that may be columns, and whether it is taken to descend."""
    first = _ORDER_BY.search(clause)
    words = [word.strip().rsplit(".", 1)[-1] for word in (first.group(1).split() if first else [])]
    upper = [word.upper() for word in words]
    descending = "DESC" in upper or "ASC" not in upper  # without either word it sorts downwards
    words = [word.replace(",", "").replace("(", "") for word in words]
    return [word for word in words if word.lower() not in _NO_COLUMN], descending


def _sort(frame: Frame, by: Sequence[int], descending: bool) -> Frame:
    """Rows sorted by these columns, NULLs last in either direction."""
    rows = list(frame.rows)
    for column in reversed(by):
        kinds = {_rank(row[column]) for row in rows if not _missing(row[column])}
        # One column is sorted as it is; several are numbered first, which puts numbers before text.
        if len(kinds) > 1 and (len(by) == 1 or 2 in kinds):
            raise _Raised
        known = [row for row in rows if not _missing(row[column])]
        known.sort(key=lambda row: (_rank(row[column]), row[column]), reverse=descending)
        rows = known + [row for row in rows if _missing(row[column])]
    return frame.with_rows(rows)


def _is_part(gold: Frame, predicted: Frame, ordered: bool) -> bool:
    if not gold.rows or not gold.columns:
        return False
    left = list(range(len(predicted.columns)))
    matched: list[int] = []
    in_order: dict[int, Frame] = {}
    for column, name in enumerate(gold.columns):
        if gold.columns.count(name) > 1:
            raise _Raised
        wanted = _sort(gold.take([column]), [0], descending=False)
        for other in left:
            if predicted.columns.count(predicted.columns[other]) > 1:
                raise _Raised
            if other not in in_order:
                in_order[other] = _sort(predicted.take([other]), [0], descending=False)
            if _series_equal(wanted, in_order[other]):
                matched.append(other)
                left.remove(other)
                break
        else:
            return False
    one = _normalize(gold, None, ordered)
    two = _normalize(predicted.take(matched, gold.columns), None, ordered)
    width = range(len(one.columns))
    return one.shape == two.shape and all(_series_equal(one.take([i]), two.take([i])) for i in width)


def _series_equal(left: Frame, right: Frame) -> bool:
    """Two columns by `assert_series_equal`: within tolerance, exactly where either is of integers."""
    if len(left.rows) != len(right.rows):
        return False
    exact = left.integer[0] or right.integer[0]
    return all(_near(one, two, exact) for (one,), (two,) in zip(left.rows, right.rows, strict=True))


def _near(one: Any, two: Any, exact: bool) -> bool:
    if _missing(one) or _missing(two):
        return _missing(one) and _missing(two)
    if isinstance(one, int | float) and isinstance(two, int | float) and not exact:
        return math.isclose(one, two, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(one == two)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _rank(value: Any) -> int:
    return 0 if isinstance(value, int | float) else 1 if isinstance(value, str) else 2
