"""Cohen's kappa against worked examples, a formula of its own, and its undefined corners."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.text2sql.teaching.agreement import (
    Agreement,
    Disagreement,
    confusion,
    table_markdown,
    table_text,
)


def test_counts_and_disagreements_in_the_judges_order() -> None:
    judge = {"a": True, "b": True, "c": False, "d": False, "only judged": True}
    execution = {"d": True, "a": True, "b": False, "c": False, "only run": False, "also": True}
    found = confusion(judge, execution)
    assert (found.both_yes, found.judge_only, found.execution_only, found.both_no) == (1, 1, 1, 1)
    assert found.disagreements == (Disagreement("b", True, False), Disagreement("d", False, True))
    assert (found.n, found.unpaired) == (4, 3)
    assert found.kappa == 0


def test_a_known_value() -> None:
    # 20/5/10/15: observed 0.70, expected 0.50 (the textbook example of two readers of 50 applications)
    found = Agreement(20, 5, 10, 15)
    assert found.kappa == pytest.approx(0.4)
    low, high = found.interval or (math.nan, math.nan)
    assert (low, high) == pytest.approx((0.1460, 0.6540), abs=1e-3)


@pytest.mark.parametrize(
    "counts", [(0, 0, 0, 0), (7, 0, 0, 0), (0, 0, 0, 7)], ids=["nothing", "all yes", "all no"]
)
def test_undefined(counts: tuple[int, int, int, int]) -> None:
    found = Agreement(*counts)
    assert found.kappa is None and found.interval is None
    assert found.record()["kappa"] is None
    assert "κ undefined" in table_text(found) or "no item" in table_text(found)


def test_one_side_constant_is_zero_not_undefined() -> None:
    assert Agreement(5, 3, 0, 0).kappa == 0


def test_perfect_and_opposite() -> None:
    assert Agreement(4, 0, 0, 6).kappa == 1
    assert Agreement(4, 0, 0, 6).interval == (1, 1)
    assert Agreement(0, 5, 5, 0).kappa == -1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_against_the_definition(pairs: list[tuple[bool, bool]]) -> None:
    found = confusion(
        {str(i): a for i, (a, _) in enumerate(pairs)}, {str(i): b for i, (_, b) in enumerate(pairs)}
    )
    n = len(pairs)
    assert found.n == n and found.unpaired == 0
    assert len(found.disagreements) == found.judge_only + found.execution_only
    if n:
        p, q = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
        chance = p * q + (1 - p) * (1 - q)
        if chance < 1 - 1e-12:
            same = sum(a == b for a, b in pairs) / n
            assert found.kappa == pytest.approx((same - chance) / (1 - chance))
            low, high = found.interval or (math.nan, math.nan)
            assert -1 <= low <= high <= 1
        else:
            assert found.kappa is None


def test_rendering() -> None:
    found = confusion({"a": True, "b": False}, {"a": True, "b": True, "c": True})
    assert "| judge yes | 1 | 0 |" in table_markdown(found)
    assert "50.0% of 2" in table_text(found) and "1 with only one" in table_text(found)
