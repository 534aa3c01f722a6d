"""Few-shot examples from the bundled training rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantlab.data.exclusions import normal_question, normal_sql
from quantlab.errors import DataError
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.prompt.few_shot import is_held_out, select_shots, usable_shots
from quantlab.text2sql.prompt.prompt import build_prompt, shot_text


@pytest.fixture(scope="module")
def train() -> list[Item]:
    return load_items("ko_text2sql:train")


@pytest.fixture(scope="module")
def evaluated() -> list[Item]:
    return load_items("ko_text2sql:test")


def test_the_same_seed_draws_the_same_and_fewer_are_the_first_of_more(
    train: list[Item], evaluated: list[Item]
) -> None:
    ten = select_shots(train, 10, evaluated)
    assert select_shots(train, 10, evaluated) == ten
    assert [select_shots(train, count, evaluated) for count in (0, 1, 4)] == [[], ten[:1], ten[:4]]
    other = select_shots(train, 10, evaluated, seed=1)
    assert other != ten and select_shots(train, 10, evaluated, seed=1) == other


def test_databases_take_turns(train: list[Item], evaluated: list[Item]) -> None:
    drawn = select_shots(train, 14, evaluated)
    assert len({item.db_id for item in drawn[:7]}) == 7
    assert len({item.id for item in drawn}) == 14


def test_the_game_database_is_never_shown(train: list[Item], evaluated: list[Item]) -> None:
    mixed = [*evaluated, *train[:20]]
    assert all(not is_held_out(item) for item in usable_shots(mixed, []))
    assert {item.extra["db"] for item in select_shots(mixed, 20, [])} <= {item.extra["db"] for item in train}
    with pytest.raises(DataError, match="1 examples are asked for, 0 of 126 rows may be shown"):
        select_shots(evaluated, 1, [])
    # told by its file, and by its number in data that has no names, as the book's
    bare = replace(evaluated[0], extra={}, db_id="77")
    assert is_held_out(bare) and is_held_out(replace(bare, database=None, db_id="1"))
    assert not is_held_out(replace(bare, database=None))
    assert not is_held_out(replace(train[0], db_id="1"))  # a name wins over a number


def test_what_is_evaluated_is_never_shown(train: list[Item]) -> None:
    """The question in other spacing, the query in other case, an accepted alternative: each keeps the row away."""
    rows = train[:4]
    listed = [
        replace(rows[0], id="a", question=rows[0].question.replace(" ", "  ") + "?!", answer="SELECT 1;"),
        replace(rows[1], id="b", question="다른 질문", answer=rows[1].answer.lower().rstrip(";")),
        replace(rows[2], id="c", question="또 다른 질문", answer="SELECT 2;", alternatives=(rows[2].answer,)),
    ]
    assert usable_shots(rows, listed) == [rows[3]]
    assert usable_shots(rows, [*listed, rows[3]]) == []
    shown = select_shots(train, 50, train[:5000])
    seen = {normal_question(item.question) for item in train[:5000]}
    queries = {normal_sql(item.answer) for item in train[:5000]}
    assert all(
        normal_question(item.question) not in seen and normal_sql(item.answer) not in queries
        for item in shown
    )


def test_too_few_rows_is_said(train: list[Item]) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl: 3 examples are asked for, 1 of 2 rows may be shown"):
        select_shots(train[:2], 3, train[:1], name="mine.jsonl")


def test_an_example_is_the_prompt_its_statement_and_a_blank_line(train: list[Item]) -> None:
    item = replace(train[0], answer=" SELECT 1 ;; ")
    assert shot_text(item) == build_prompt(item.context, item.question) + "SELECT 1;\n\n"
