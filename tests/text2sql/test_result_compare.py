"""The rules of result comparison, one by one."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from quantlab.text2sql.scoring.order_by import Group
from quantlab.text2sql.scoring.result_compare import Comparison, compare

Rows = list[tuple[Any, ...]]


def same(
    gold: Rows, predicted: Rows, groups: list[Group] | None = None, width: int | None = None
) -> Comparison:
    columns = [f"c{i}" for i in range(len(gold[0]) if gold else width or 1)]
    found = [f"d{i}" for i in range(len(predicted[0]) if predicted else width or len(columns))]
    return compare(
        gold, predicted, gold_columns=columns, predicted_columns=found, groups=groups, sorted_by="score DESC"
    )


def in_order(rows: Rows) -> list[Group]:
    return [Group(1, (row,)) for row in rows]


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ([(1,), (2,)], [(2,), (1,)]),  # a multiset
        ([(1,)], [(1.0,)]),  # integers equal floats numerically
        ([(0.1 + 0.2,)], [(0.3,)]),
        ([(1_000_000.0,)], [(1_000_000.5,)]),  # within 1e-6 relative
        ([(0.0,)], [(1e-17,)]),
        ([(None,), ("a",)], [("a",), (None,)]),
        ([("a", 1), ("b", 2)], [(1, "a"), (2, "b")]),  # columns permuted
        ([(float("inf"),)], [(float("inf"),)]),
        ([(b"\x00",)], [(b"\x00",)]),
        ([(2**62,)], [(2**62,)]),
    ],
)
def test_equal(gold: Rows, predicted: Rows) -> None:
    assert same(gold, predicted).equal
    assert same(predicted, gold).equal


@pytest.mark.parametrize(
    ("gold", "predicted", "words"),
    [
        ([(1, 2)], [(1,)], "1 column against 2: a column is missing"),
        ([(1,)], [(1, 2)], "2 columns against 1: a column too many"),
        ([(1,)] * 5, [(1,)] * 3, "3 rows against 5: the same rows"),
        ([(1,), (2,)], [(1,)], "1 row against 2"),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], "1 of 3 rows differ: 2 is not expected, 1 is missing"),
        ([("1.0",)], [(1,)], "1 where '1.0' is expected"),
        ([("a",)], [("A",)], "'A' where 'a' is expected"),
        ([(None,)], [(0,)], "0 where NULL is expected"),
        ([(None,)], [("",)], "'' where NULL is expected"),
        ([(b"a",)], [("a",)], "'a' where 1 bytes is expected"),
        ([(1_000_001,)], [(1_000_002,)], "1000002 where 1000001 is expected"),  # integers compare exactly
        ([(2**62,)], [(2**62 + 1,)], str(2**62 + 1)),
        ([(1.0,)], [(1.00001,)], "1.00001 where 1.0 is expected"),
        ([(1, "a"), (2, "b")], [("b", 1), ("a", 2)], "rows differ"),  # columns match one by one, rows do not
    ],
)
def test_different(gold: Rows, predicted: Rows, words: str) -> None:
    found = same(gold, predicted)
    assert not found.equal
    assert words in found.reason


def test_order_counts_only_when_asked_for() -> None:
    rows: Rows = [(3,), (2,), (1,)]
    assert same(rows, rows[::-1]).equal
    found = same(rows, rows[::-1], in_order(rows))
    assert found == Comparison(False, "row order differs though the question's query sorts by score DESC")


def test_ties_may_change_places() -> None:
    gold: Rows = [("가", 3), ("나", 2), ("다", 2), ("라", 1)]
    groups = [Group(1, (gold[0],)), Group(2, (gold[1], gold[2])), Group(1, (gold[3],))]
    assert same(gold, [gold[0], gold[2], gold[1], gold[3]], groups).equal
    assert not same(gold, [gold[1], gold[0], gold[2], gold[3]], groups).equal


def test_a_tie_at_the_limit_may_be_cut_either_way() -> None:
    tied = (("나",), ("다",), ("라",))
    groups = [Group(1, (("가",),)), Group(1, tied)]
    for last in tied:
        assert same([("가",), ("나",)], [("가",), last], groups).equal
    assert not same([("가",), ("나",)], [("가",), ("마",)], groups).equal
    assert not same([("가",), ("나",)], [("가",), ("가",)], groups).equal


def test_columns_permuted_in_a_sequence() -> None:
    gold: Rows = [("a", 1, 7), ("b", 2, 7), ("c", 2, 7)]
    groups = [Group(1, (gold[0],)), Group(2, (gold[1], gold[2]))]
    assert same(gold, [(7, 1, "a"), (7, 2, "c"), (7, 2, "b")], groups).equal
    assert not same(gold, [(7, 2, "b"), (7, 1, "a"), (7, 2, "c")], groups).equal


def test_equal_columns_are_not_searched_through() -> None:
    """Fourteen columns with the same values: 14! orders, but one look decides."""
    gold: Rows = [(*[0] * 14, "x"), (*[1] * 14, "y")]
    started = time.perf_counter()
    assert same(gold, [("y", *[1] * 14), ("x", *[0] * 14)]).equal
    assert time.perf_counter() - started < 1.0


def test_hard_column_orders_end() -> None:
    """Random bits: every column has the same counts, only the joint distribution tells them apart."""
    rng = random.Random(0)
    columns = []
    for _ in range(30):
        column = [0] * 32 + [1] * 32
        rng.shuffle(column)
        columns.append(column)
    gold: Rows = list(zip(*columns, strict=True))
    order = list(range(30))
    rng.shuffle(order)
    shuffled: Rows = [tuple(row[i] for i in order) for row in gold]
    rng.shuffle(shuffled)
    started = time.perf_counter()
    assert same(gold, shuffled).equal
    changed = [*shuffled[:-1], tuple(1 - value for value in shuffled[-1])]
    assert not same(gold, changed).equal
    assert time.perf_counter() - started < 10.0


def test_random_tables_against_brute_force() -> None:
    """On tables small enough to try every order of columns and rows, the search is never wrong."""
    import itertools

    rng = random.Random(1)
    outcomes = set()
    for _ in range(400):
        width, height = rng.randint(1, 4), rng.randint(1, 4)
        gold = [tuple(rng.randint(0, 1) for _ in range(width)) for _ in range(height)]
        if rng.random() < 0.5:
            order = rng.sample(range(width), width)
            predicted = [tuple(row[i] for i in order) for row in rng.sample(gold, height)]
        else:
            predicted = [tuple(rng.randint(0, 1) for _ in range(width)) for _ in range(height)]
        expected = any(
            sorted(gold) == sorted(tuple(row[i] for i in order) for row in predicted)
            for order in itertools.permutations(range(width))
        )
        assert same(gold, predicted).equal is expected, (gold, predicted)
        outcomes.add(expected)
    assert outcomes == {True, False}


def test_a_large_result_is_fast() -> None:
    rng = random.Random(2)
    gold: Rows = [(i, rng.random() * 1e6, f"이름{i % 97}") for i in range(20_000)]
    predicted: Rows = [(name, value * (1 + 1e-12), i) for i, value, name in rng.sample(gold, len(gold))]
    started = time.perf_counter()
    assert same(gold, predicted).equal
    assert time.perf_counter() - started < 5.0
