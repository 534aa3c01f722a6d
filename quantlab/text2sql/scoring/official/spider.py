"""Spider's test-suite rule (taoyds/test-suite-sql-eval, `exec_eval.py`): what it makes of a query, how it compares.

A query loses its DISTINCTs and all statements but the first, and `YEAR(CURDATE())` is 2020. Results are bags of rows,
or sequences, and some permutation of the predicted columns must make them equal. The original enumerates permutations
after a sample of rows has ruled some out; the search here assigns columns one by one and gives the same answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

from quantlab.text2sql.scoring.order_by import Row

SEARCH_CELLS = (
    5_000_000  # table cells looked at for a permutation of columns; the original would go on for ever
)

# A comment without an end is the rest of the text: each character is looked at once, however hostile the text.
TOKEN = re.compile(r"'[^']*'" r'|"[^"]*"' r"|`[^`]*`|--[^\n]*|/\*.*?(?:\*/|\Z)|\w+|.", re.DOTALL)
_THIS_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)


def rewrite(sql: str, *, predicted: bool, keep_distinct: bool) -> str:
    """The text that reaches the database. The word DISTINCT goes wherever it stands, COUNT(DISTINCT …) included."""
    if predicted:
        sql = sql.replace(" value ", " 1 ")  # the placeholder of models that do not predict values
    sql = sql.replace("> =", ">=").replace("< =", "<=").replace("! =", "!=")
    if not keep_distinct:
        tokens = TOKEN.findall(sql)
        tokens = tokens[: tokens.index(";") + 1] if ";" in tokens else tokens
        sql = "".join(token for token in tokens if token.lower() != "distinct")
    return _THIS_YEAR.sub("2020", sql)


def results_equal(gold_rows: Sequence[Row], predicted_rows: Sequence[Row], ordered: bool) -> bool:
    """Two empty results are equal, whatever their columns."""
    gold, predicted = _decoded(gold_rows), _decoded(predicted_rows)
    if not gold and not predicted:
        return True
    if len(gold) != len(predicted) or len(gold[0]) != len(predicted[0]):
        return False
    # Its quick rejection sorts each row by how the values print, so 1 and 1.0 may come to stand at other places.
    left, right = ([_by_print(row) for row in rows] for rows in (gold, predicted))
    if left != right if ordered else set(left) != set(right):
        return False
    if ordered:
        return Counter(zip(*gold, strict=True)) == Counter(zip(*predicted, strict=True))
    return _same_bag(gold, predicted)


def _same_bag(gold: list[Row], predicted: list[Row]) -> bool:
    """Whether some order of the predicted columns makes the two bags of rows equal."""
    width = len(gold[0])
    contents: list[Hashable] = list(zip(*predicted, strict=True))
    columns = [Counter(column) for column in zip(*predicted, strict=True)]
    candidates = [
        [other for other in range(width) if columns[other] == Counter(column)]
        for column in zip(*gold, strict=True)
    ]
    budget = SEARCH_CELLS

    def assign(chosen: tuple[int, ...]) -> bool:
        nonlocal budget
        budget -= len(gold) * len(chosen)
        prefix = Counter(row[: len(chosen)] for row in gold)
        if budget < 0 or prefix != Counter(tuple(row[i] for i in chosen) for row in predicted):
            return False
        if len(chosen) == width:
            return True
        tried: set[Hashable] = set()  # columns alike in every row are one choice
        for other in candidates[len(chosen)]:
            if other not in chosen and contents[other] not in tried:
                tried.add(contents[other])
                if assign((*chosen, other)):
                    return True
        return False

    return assign(())


def _by_print(row: Row) -> Row:
    return tuple(sorted(row, key=lambda value: str(value) + str(type(value))))


def _decoded(rows: Sequence[Row]) -> list[Row]:
    """Rows as its connection decodes them: bytes that are no UTF-8 are dropped."""
    return [
        tuple(
            value.encode("utf-8", "surrogateescape").decode("utf-8", "ignore")
            if isinstance(value, str)
            else value
            for value in row
        )
        for row in rows
    ]
