"""The plan of writing new questions: exact proportions, no two requests alike, stable; and rows from replies."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.errors import DataError
from quantlab.teacher.ledger import request_key
from quantlab.text2sql.data.item import Item, parse_row
from quantlab.text2sql.teaching.prompts import load_prompt
from quantlab.text2sql.teaching.question_writing import (
    Context,
    Planned,
    contexts_of,
    largest_remainder,
    parse_written,
    plan_writing,
    unusable_pairs,
    written_items,
)

KO = load_prompt("write", "ko")
LEVELS = {"easy": 0.3, "medium": 0.4, "hard": 0.3}
CONTEXTS = [Context(f"CREATE TABLE t{n} (a INTEGER);", str(n % 2)) for n in range(3)]


def keys(plan: list[Planned]) -> list[str]:
    return [request_key("m", planned.request) for planned in plan]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 5000),
    st.lists(st.floats(0, 10), min_size=1, max_size=3).filter(lambda shares: sum(shares) > 0),
)
def test_largest_remainder_is_exact_and_fair(total: int, shares: list[float]) -> None:
    named = {str(n): share for n, share in enumerate(shares)}
    counts = largest_remainder(total, named)
    assert sum(counts.values()) == total
    for name, share in named.items():
        assert abs(counts[name] - total * share / sum(shares)) < 1
        assert share > 0 or counts[name] == 0


def test_largest_remainder_examples() -> None:
    assert largest_remainder(1000, LEVELS) == {"easy": 300, "medium": 400, "hard": 300}
    assert largest_remainder(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    with pytest.raises(ValueError):
        largest_remainder(3, {"a": 0})


def test_the_plan_has_the_count_and_the_proportions() -> None:
    plan = plan_writing(CONTEXTS, 101, LEVELS, prompt=KO, per_request=4)
    wanted = largest_remainder(101, LEVELS)
    got: Counter[str] = Counter()
    for planned in plan:
        got[planned.level] += planned.count
        assert 1 <= planned.count <= 4
        assert f"정확히 {planned.count}개" in planned.request.messages[1]["content"]
    assert got == wanted
    used = Counter(planned.context.ddl for planned in plan if planned.level == "medium")
    assert max(used.values()) - min(used.values()) <= 1, "contexts are used evenly"


def test_no_two_requests_are_alike_even_on_one_table() -> None:
    plan = plan_writing(CONTEXTS[:1], 600, LEVELS, prompt=KO, per_request=5)
    assert len(set(keys(plan))) == len(plan) == 120
    topics = [planned.topic for planned in plan if planned.level == "easy"]
    assert len(set(topics[:10])) == 10, "a topic comes back only after all others"


def test_stable_and_extended_by_a_larger_count() -> None:
    small = keys(plan_writing(CONTEXTS, 100, LEVELS, prompt=KO, per_request=5))
    assert small == keys(plan_writing(CONTEXTS, 100, LEVELS, prompt=KO, per_request=5))
    assert small == keys(plan_writing([*CONTEXTS, CONTEXTS[0]], 100, LEVELS, prompt=KO, per_request=5))
    assert set(small) < set(keys(plan_writing(CONTEXTS, 300, LEVELS, prompt=KO, per_request=5)))
    assert small != keys(plan_writing(CONTEXTS, 100, LEVELS, prompt=KO, per_request=5, seed=1))


def test_only_the_levels_named() -> None:
    plan = plan_writing(CONTEXTS, 7, {"hard": 1, "easy": 0}, prompt=load_prompt("write", "en"), per_request=3)
    assert [(planned.level, planned.count) for planned in plan] == [("hard", 3), ("hard", 3), ("hard", 1)]


def test_no_tables() -> None:
    with pytest.raises(DataError, match="no tables"):
        plan_writing([], 5, LEVELS, prompt=KO)


def test_contexts_of_rows() -> None:
    rows = [Item(str(n), "2", f"CREATE TABLE t{n // 2} (a);", "q", "s", Path("x.sqlite")) for n in range(4)]
    assert contexts_of(rows) == [Context(f"CREATE TABLE t{n} (a);", "2", Path("x.sqlite")) for n in range(2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"pairs": {}}', "'pairs' must be a list, found an object"),
        ('{"pairs": []}', "'pairs' is empty"),
        ('{"pairs": ["SELECT 1"]}', "pair 1 must be an object, found text"),
        ('{"pairs": [{"question": "q"}]}', "pair 1 has no key 'sql'"),
        ('{"pairs": [{"question": "q", "sql": "s", "level": "easy"}]}', "unknown keys 'level'"),
        ('{"pairs": [{"question": "q", "sql": "s"}, {"question": " ", "sql": "s"}]}', "'question' of pair 2 is empty"),
        ('{"pairs": [{"question": "q", "sql": 1}]}', "'sql' of pair 1 must be text, found a number"),
        ('{"pairs": [{"question": "q", "sql": "s"}]', "not JSON"),
        ('{"questions": []}', "no key 'pairs'"),
        ("SELECT 1;", "not JSON"),
    ],
)  # fmt: skip
def test_refused_replies(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_written(text)
    assert words in str(caught.value) and unusable_pairs(text) == str(caught.value)


def reply(*pairs: tuple[str, str]) -> str:
    return json.dumps({"pairs": [{"question": question, "sql": sql} for question, sql in pairs]})


def test_rows_from_replies() -> None:
    plan = plan_writing(CONTEXTS[:2], 4, {"easy": 1}, prompt=KO, per_request=2)
    first = reply(("첫 번째\n 질문", " SELECT a FROM t0; "), ("둘", "SELECT 2;"), ("남는 것", "SELECT 3;"))
    assert unusable_pairs(f"```json\n{first}\n```") is None
    items = written_items(plan, [first, None])
    assert [(item.question, item.answer) for item in items] == [
        ("첫 번째 질문", "SELECT a FROM t0;"),
        ("둘", "SELECT 2;"),
    ], "one more than asked for is cut"
    assert items[0].context == plan[0].context.ddl and items[0].extra["level"] == "easy"
    assert written_items(plan, [first, "no JSON"]) == items
    row = {"id": items[0].id, "db_id": items[0].db_id, "context": items[0].context}
    json.dumps(row | dict(items[0].extra))  # can be written down
    assert (
        parse_row(row | {"question": items[0].question, "answer": items[0].answer}, "f:1").id == items[0].id
    )


def test_ids_are_stable_and_unique() -> None:
    plan = plan_writing(CONTEXTS[:1], 4, {"easy": 1}, prompt=KO, per_request=2)
    same = reply(("q", "SELECT 1;"), ("q", "SELECT 1;"))
    once = written_items(plan, [None, same])
    twice = written_items(plan, [same, same])
    assert once[0].id == twice[0].id
    assert len({item.id for item in twice}) == 4
