"""Whether two query results are the same answer, and in words why not.

The rules:
- rows are a multiset; they are a sequence only when the gold's outermost query sorts, up to ties
  (`order_by.py`);
- columns may stand in another order and have other names; none may be missing or too many;
- integers compare exactly; where a float is involved, within 1e-6 relative (1e-12 absolute at zero); 1
  equals 1.0;
- text compares exactly and never equals a number or a blob; NULL equals only NULL.

That a result is empty is the caller's business: two empty results are equal here, and no evidence of
anything.

How: each value becomes a key such that equal values have equal keys (floats by clustering), so rows can be
counted in hash tables. When the columns as they stand do not match, those that hold the same multiset of
keys are candidates for each other, and a search assigns them one by one, dropping an assignment as soon as
the rows so far differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.text2sql.scoring.order_by import Group, Row

RELATIVE, ABSOLUTE = 1e-6, 1e-12
SEARCH_CELLS = 5_000_000  # work of the column search, in table cells looked at, until it gives up


@dataclass(frozen=True)
class Comparison:
    """`reason` says what differs, or why equal results are equal in spite of appearances; empty otherwise."""

    equal: bool
    reason: str = ""


def compare(
    gold: Sequence[Row],
    predicted: Sequence[Row],
    *,
    gold_columns: Sequence[str],
    predicted_columns: Sequence[str],
    groups: Sequence[Group] | None = None,
    sorted_by: str = "",
) -> Comparison:
    """Compare two results. `groups` (gold in tie groups, in order) makes the order of rows count."""
    width = len(gold_columns)
    if len(predicted_columns) != width:
        what = "a column is missing" if len(predicted_columns) < width else "a column too many"
        return Comparison(False, f"{_count(predicted_columns, 'column')} against {width}: {what}")
    free = [Group(len(gold), tuple(gold))] if gold else []
    expected = list(groups) if groups is not None else free
    keys = _Keys([row for group in expected for row in group.rows] + list(predicted))
    wanted = [(group.take, [keys.row(row) for row in group.rows]) for group in expected]
    found = [keys.row(row) for row in predicted]
    if len(predicted) != len(gold):
        return Comparison(False, _row_count_words(gold, predicted, [keys.row(row) for row in gold], found))
    order = _find_columns(wanted, found, width)
    if order is not None:
        moved = order != tuple(range(width))
        return Comparison(True, "columns stand in another order" if moved else "")
    if groups is not None:
        anywhere = [(len(gold), [keys.row(row) for row in gold])]
        if _find_columns(anywhere, found, width) is not None:
            return Comparison(False, f"row order differs though the question's query sorts by {sorted_by}")
    return Comparison(False, _difference_words(gold, predicted, keys, gold_columns))


KeyRow = tuple[Hashable, ...]
Wanted = list[tuple[int, list[KeyRow]]]


class _Keys:
    """Values to hashable keys: equal keys mean equal values by the rules of this module."""

    def __init__(self, rows: Iterable[Row]) -> None:
        numbers = {value for row in rows for value in row if isinstance(value, int | float)}
        self._cluster: dict[float, float] | None = None
        # Python hashes 1 and 1.0 alike, so without fractions the numbers are their own keys.
        if any(isinstance(value, float) for value in numbers):
            self._cluster = _clusters(numbers)

    def row(self, row: Row) -> KeyRow:
        return tuple(self._key(value) for value in row)

    def _key(self, value: Any) -> Hashable:
        if isinstance(value, int | float):
            return self._cluster[value] if self._cluster is not None else value
        return (type(value).__name__, value)


def _clusters(numbers: set[float]) -> dict[float, float]:
    """Number → the smallest number of its cluster; a cluster's members are all within tolerance of the smallest."""
    floats = {value for value in numbers if isinstance(value, float)}
    result: dict[float, float] = {}
    first: float | None = None
    exact = True  # the cluster so far holds integers only
    for value in sorted(numbers):
        inexact = value in floats
        if first is None or (exact and not inexact) or not _close(first, value):
            first, exact = value, not inexact
        else:
            exact = False
        result[value] = first
    return result


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _find_columns(wanted: Wanted, found: list[KeyRow], width: int) -> tuple[int, ...] | None:
    """For each gold column the predicted column it matches, such that the rows match; None where there is none."""
    if _matches(wanted, found, tuple(range(width)), tuple(range(width))):
        return tuple(range(width))
    if width < 2:
        return None
    candidates = [_same_contents(wanted, found, column, width) for column in range(width)]
    if not all(candidates):
        return None
    by_choice = sorted(range(width), key=lambda column: len(candidates[column]))
    contents = [tuple(row[column] for row in found) for column in range(width)]
    budget = SEARCH_CELLS

    def assign(chosen: dict[int, int]) -> dict[int, int] | None:
        nonlocal budget
        if len(chosen) == width:
            return chosen
        column = by_choice[len(chosen)]
        tried: set[Hashable] = set()
        for candidate in candidates[column]:
            # Columns with the same content in every row are interchangeable: trying one of them is enough.
            if candidate in chosen.values() or contents[candidate] in tried:
                continue
            tried.add(contents[candidate])
            longer = chosen | {column: candidate}
            budget -= len(found) * len(longer)
            if budget < 0:
                return None
            if _matches(wanted, found, tuple(longer), tuple(longer.values())):
                complete = assign(longer)
                if complete is not None:
                    return complete
        return None

    assigned = assign({})
    return None if assigned is None else tuple(assigned[column] for column in range(width))


def _same_contents(wanted: Wanted, found: list[KeyRow], column: int, width: int) -> list[int]:
    """Predicted columns whose values, group by group, could be those of the gold column."""
    return [other for other in range(width) if _matches(wanted, found, (column,), (other,))]


def _matches(wanted: Wanted, found: list[KeyRow], left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether each stretch of predicted rows, seen through columns `right`, lies in its group seen through `left`."""
    at = 0
    for take, rows in wanted:
        if take == 1 and len(rows) == 1:
            row, other = rows[0], found[at]
            if any(row[i] != other[j] for i, j in zip(left, right, strict=True)):
                return False
        else:
            allowed = Counter(tuple(row[i] for i in left) for row in rows)
            seen = Counter(tuple(row[j] for j in right) for row in found[at : at + take])
            if any(number > allowed[row] for row, number in seen.items()):
                return False
        at += take
    return True


def _row_count_words(
    gold: Sequence[Row], predicted: Sequence[Row], wanted: list[KeyRow], found: list[KeyRow]
) -> str:
    words = f"{_count(predicted, 'row')} against {len(gold)}"
    if gold and set(wanted) == set(found):
        return words + ": the same rows, some of them more often in one of the two"
    return words


def _difference_words(
    gold: Sequence[Row], predicted: Sequence[Row], keys: _Keys, columns: Sequence[str]
) -> str:
    wanted, found = [keys.row(row) for row in gold], [keys.row(row) for row in predicted]
    missing = Counter(wanted) - Counter(found)
    surplus = Counter(found) - Counter(wanted)
    expected = next((row for row, key in zip(gold, wanted, strict=True) if key in missing), None)
    other = next((row for row, key in zip(predicted, found, strict=True) if key in surplus), None)
    if expected is None or other is None:
        return "rows differ from what the sort order allows"
    if len(gold) == 1:
        return f"{show_row(other)} where {show_row(expected)} is expected"
    share = f"{sum(missing.values())} of {len(gold)} rows differ"
    return f"{share}: {show_row(other)} is not expected, {show_row(expected)} is missing"


def show_row(row: Row, limit: int = 80) -> str:
    """A row for messages; long ones are cut."""
    words = ", ".join(_show(value) for value in row)
    words = words if len(row) == 1 else f"({words})"
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _show(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        text = value if len(value) <= 40 else value[:39] + "…"
        return "'" + text.encode("utf-8", "replace").decode("utf-8") + "'"
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
