"""Why our verdict and a published one differ, in words, for the report that sets them side by side.

The reasons are found by asking each question again of the results: would they be equal if order did not count, if
duplicates did not, if floats were compared our way. Where none of them explains it, both rules are quoted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from quantlab.text2sql.scoring.exact_match import fold
from quantlab.text2sql.scoring.execution import Verdict
from quantlab.text2sql.scoring.official.compare import Published, published_query
from quantlab.text2sql.scoring.official.sql_eval import broadcast_equal, make_frame
from quantlab.text2sql.scoring.order_by import Group, Row, order_plan
from quantlab.text2sql.scoring.result_compare import compare

RULE_WORDS = {
    "spider-test-suite": "a bag of rows, a sequence when the gold says ORDER BY anywhere, columns in any order",
    "bird": "the set of rows, columns in place",
    "sql-eval": "data frames without duplicate rows, sorted, the gold's columns among the predicted ones",
}
NO_DISTINCT = "DISTINCT is taken out of both queries there before they run"


def differences(
    rule: str, ours: Verdict, published: Published, gold_sql: str, predicted_sql: str
) -> list[str]:
    """What makes `ours` and the published verdict differ, the first reason being the plainest; [] where they agree."""
    if published.verdict is None:
        return [f"the published verdict cannot be told: {published.note}"]
    if published.verdict == (ours.verdict == "ok"):
        return []
    found = _accepted if published.verdict else _refused
    reasons = list(found(rule, ours, published, gold_sql, predicted_sql))
    if reasons:
        return reasons
    why = f": {ours.why}" if ours.why else ""
    return [f"the published rule compares {RULE_WORDS[rule]}; ours is {ours.verdict}{why}"]


def _accepted(
    rule: str, ours: Verdict, published: Published, gold_sql: str, predicted_sql: str
) -> Iterator[str]:
    """Right there, not here."""
    wanted, found = _rows(published)
    columns, others = _columns(published)
    if ours.kind == "denied":
        yield f"a write is run there, here it is denied: {published.note}"
    elif ours.kind == "empty" or ours.verdict == "unparsed":
        yield "text that is no query gives no rows there, here it is no answer"
    if not wanted and not found:
        yield "empty equals empty there" + ("" if ours.evidence else "; here an empty gold is no evidence")
        return
    if ours.verdict == "timeout":
        yield "the query ended within what it is given there"
    if _loses_distinct(rule, gold_sql) or _loses_distinct(rule, predicted_sql):
        yield NO_DISTINCT
    if rule == "sql-eval" and len(others) > len(columns):
        yield "the published rule accepts columns too many"
    if rule == "sql-eval":
        left, right = make_frame(columns, wanted), make_frame(others, found)
        if left.shape != right.shape and broadcast_equal(left, right):
            shapes = f"{left.shape[0]}×{left.shape[1]} against {right.shape[0]}×{right.shape[1]}"
            yield f"the published rule compares values before shapes, and {shapes} values broadcast"
            return
    if len(columns) == len(others) and len(wanted) != len(found) and set(wanted) == set(found):
        yield "the published rule accepts duplicates"
    elif len(columns) == len(others) and wanted != found and _equal_our_way(published, wanted, found):
        yield "the published rule ignores row order"
    if (
        rule == "sql-eval"
        and len(columns) == len(others)
        and _inexact(wanted, found)
        and len(wanted) == len(found)
    ):
        yield "the published rule forgives a relative error of 1e-5, ours 1e-6"


def _refused(
    rule: str, ours: Verdict, published: Published, gold_sql: str, predicted_sql: str
) -> Iterator[str]:
    """Right here, not there."""
    wanted, found = _rows(published)
    columns, others = _columns(published)
    if published.predicted is not None and published.predicted.status != "rows":
        yield f"the query as it is run there fails: {published.predicted.reason}"
        return
    if _loses_distinct(rule, gold_sql) != _loses_distinct(rule, predicted_sql):
        yield NO_DISTINCT
    plan, same = order_plan(gold_sql), _equal_our_way(published, wanted, found)
    anywhere = plan is None and "order by" in gold_sql.lower()
    if rule == "spider-test-suite" and anywhere and same and wanted != found:
        yield "the published rule takes any ORDER BY in the gold for the order of the answer"
    if plan is not None and not (
        same if rule == "bird" else _equal_our_way(published, wanted, found, in_order=True)
    ):
        yield f"rows tied under {plan.words} may change places here, not there"
    if rule == "bird" and len(columns) > 1 and same and not _same_in_place(wanted, found):
        yield "the published rule wants columns in the gold's order"
    if rule == "sql-eval" and (len(set(columns)) < len(columns) or len(set(others)) < len(others)):
        yield "the published tool fails on two columns of one name"
    if same and rule != "sql-eval" and _inexact(wanted, found):
        yield "the published rule compares floats exactly, ours within 1e-6"
    if rule == "sql-eval" and any(value is None for row in wanted for value in row):
        yield "a NULL among numbers is NaN there, which does not equal itself"


def _rows(published: Published) -> tuple[Sequence[Row], Sequence[Row]]:
    gold, predicted = published.gold, published.predicted
    return (gold.rows if gold else ()), (predicted.rows if predicted else ())


def _columns(published: Published) -> tuple[Sequence[str], Sequence[str]]:
    gold, predicted = published.gold, published.predicted
    return (gold.columns if gold else ()), (predicted.columns if predicted else ())


def _equal_our_way(
    published: Published, wanted: Sequence[Row], found: Sequence[Row], in_order: bool = False
) -> bool:
    """Whether our own comparison finds the results equal, order aside or row by row."""
    columns, others = _columns(published)
    groups = [Group(1, (row,)) for row in wanted] if in_order else None
    return compare(wanted, found, gold_columns=columns, predicted_columns=others, groups=groups).equal


def _same_in_place(wanted: Sequence[Row], found: Sequence[Row]) -> bool:
    """Whether each column holds about the same values as the one in its place."""
    return all(
        compare(
            [(v,) for v in left], [(v,) for v in right], gold_columns=("",), predicted_columns=("",)
        ).equal
        for left, right in zip(zip(*wanted, strict=True), zip(*found, strict=True), strict=False)
    )


def _inexact(wanted: Sequence[Row], found: Sequence[Row]) -> bool:
    numbers = [
        Counter(value for row in rows for value in row if isinstance(value, int | float))
        for rows in (wanted, found)
    ]
    return numbers[0] != numbers[1]


def _loses_distinct(rule: str, sql: str) -> bool:
    """Whether the published rule runs `sql` without a DISTINCT that it has."""
    kept, run = (published_query(rule, sql, keep_distinct=keep) for keep in (True, False))
    return fold(kept) != fold(run) and "distinct" in fold(kept) and "distinct" not in fold(run)
