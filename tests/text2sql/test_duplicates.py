"""Near duplicates and leakage: what counts as the same question, what does not, and what the bundled data holds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from quantlab.text2sql.cleaning.duplicates import (
    SMALL_GROUP,
    Leakage,
    bands,
    exact_duplicates,
    near_duplicates,
    profile,
    query_tokens,
    question_key,
    similarity,
)
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item

DDL = "CREATE TABLE books (title TEXT, price INTEGER, pages INTEGER);"


def row(question: str, sql: str, db: str = "2", name: str = "") -> Item:
    return Item(name or question, db, DDL, question, sql)


BASE = row(
    "가격이 10000원 이상인 도서의 제목을 모두 알려 주세요.", "SELECT title FROM books WHERE price >= 10000;"
)


def alike(one: Item, other: Item) -> bool:
    return bool(near_duplicates([profile(one), profile(other)], 0.7))


def leaks(one: Item, other: Item) -> bool:
    return Leakage([other], 0.7).reason(profile(one)) is not None


def test_the_same_in_another_dress_is_exact() -> None:
    dressed = row(
        "가격이 10,000원 이상인  도서의 제목을 모두 알려주세요",
        "select T1.title from books as T1 where T1.price>=10000",
    )
    assert exact_duplicates([profile(BASE), profile(dressed)]) == {1: 0}
    assert exact_duplicates([profile(BASE), profile(replace(dressed, db_id="3"))]) == {}


def test_a_reworded_question_with_the_same_query_is_near() -> None:
    reworded = replace(BASE, question="가격이 10000원 이상인 도서 제목을 모두 알려줘.")
    assert alike(BASE, reworded) and leaks(reworded, BASE)


@pytest.mark.parametrize(
    ("question", "sql"),
    [
        ("가격이 20000원 이상인 도서의 제목을 모두 알려 주세요.", "SELECT title FROM books WHERE price >= 20000;"),
        ("가격이 10000원 이하인 도서의 제목을 모두 알려 주세요.", "SELECT title FROM books WHERE price <= 10000;"),
        ("쪽수가 10000쪽 이상인 도서의 제목을 모두 알려 주세요.", "SELECT title FROM books WHERE pages >= 10000;"),
        ("가격이 10000원 이상인 도서 제목을 중복 없이 모두", "SELECT DISTINCT title FROM books WHERE price >= 10000;"),
        ("가격이 10000원 이상인 도서의 가격을 모두 알려 주세요.", "SELECT price FROM books WHERE price >= 10000;"),
    ],
    ids=["value", "direction", "column", "distinct", "result"],
)  # fmt: skip
def test_another_value_direction_or_column_is_another_question(question: str, sql: str) -> None:
    assert similarity(profile(BASE), profile(row(question, sql))) > 0.5
    assert not alike(BASE, row(question, sql))
    assert not alike(BASE, replace(BASE, id="x", question=question + " 부탁", answer=sql))


def test_one_number_in_a_long_query_is_enough() -> None:
    """So long that the similarity alone is far above any threshold."""
    columns = ", ".join(f"column_{n}" for n in range(60))
    one, other = (
        row(f"긴 질문 {'가나다라마바사' * 9} {n}개", f"SELECT {columns} FROM t LIMIT {n}") for n in (10, 11)
    )
    assert similarity(profile(one), profile(other)) > 0.9
    assert not near_duplicates([profile(one), profile(other)], 0.8)
    assert not leaks(one, other)


def test_rows_that_differ_in_evidence_are_not_the_same_prompt() -> None:
    """Neither exact nor near: the student is shown another text. Blanks make no difference, signs and case do."""
    first = row("매출이 큰 가게는?", "SELECT id FROM shops WHERE paid > 3")
    texts = ["", "매출은 paid > 3", "매출은 paid < 3", "매출은 PAID > 3", " 매출은\r\npaid  > 3 ", " \n"]
    rows = [profile(replace(first, extra={"evidence": text})) for text in texts]
    assert exact_duplicates(rows) == {4: 1, 5: 0}
    assert [(found.index, found.earlier) for found in near_duplicates(rows, 0.9)] == [(4, 1), (5, 0)]
    hinted = replace(first, extra={"evidence": "매출은 paid > 3"})
    assert leaks(hinted, first) and leaks(first, hinted)  # an evaluated question stays one whatever is known


def test_numbers_keep_sign_and_point() -> None:
    keys = {question_key(text) for text in ("값 1.5", "값 15", "값 -15", "값 1-5")}
    assert len(keys) >= 3 and question_key("값 1,500?") == question_key("값 1500")


def test_tokens_leave_strings_whole() -> None:
    assert query_tokens("SELECT t1.a FROM b AS t1 WHERE t1.c = 't2.x AS t3, it''s'") == [
        "SELECT", "a", "FROM", "b", "WHERE", "c", "=", "'t2.x AS t3, it''s'"
    ]  # fmt: skip


def test_leakage_by_question_query_and_likeness() -> None:
    evaluated = replace(BASE, id="dev-1", alternatives=("SELECT title FROM books WHERE NOT price < 10000",))
    check = Leakage([evaluated], 0.8)
    same_question = row(BASE.question.replace(".", "!"), "SELECT 1", db="77")
    assert check.reason(profile(same_question)) == "its question is that of the evaluated item dev-1"
    same_query = row("만 원부터 파는 책", "SELECT title FROM books WHERE NOT price < 10000")
    assert check.reason(profile(same_query)) == "its query is that of the evaluated item dev-1"
    assert check.reason(profile(replace(same_query, db_id="77"))) is None, "another database"
    close = replace(BASE, question=BASE.question.replace("알려", "알려 좀"), db_id="77")
    assert "similarity 0." in (check.reason(profile(close)) or "")
    assert check.reason(profile(row("책은 몇 권인가요?", "SELECT COUNT(*) FROM books"))) is None
    assert Leakage([], 0.8).reason(profile(BASE)) is None


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_bands_miss_almost_nothing(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count * rows <= 128
    if threshold >= 0.2:
        assert (1 - threshold**rows) ** count <= 1e-6


def test_hashed_groups_find_what_brute_force_finds() -> None:
    """Many rows with one query: the group is hashed, and the outcome is that of comparing all pairs in order."""
    words = ["가격", "도서", "제목", "모두", "알려", "주세요", "전부", "보여줘", "책의", "목록"]
    questions = [" ".join(choice) for choice in itertools.permutations(words, 4)][::19]
    questions += [question + " 꼭" for question in questions[::5]]
    profiles = [profile(row(question, "SELECT title FROM books")) for question in questions]
    assert len(profiles) > 5 * SMALL_GROUP
    kept: list[int] = []
    expected = set()
    for index, one in enumerate(profiles):
        if any(similarity(one, profiles[other]) >= 0.8 for other in kept):
            expected.add(index)
        else:
            kept.append(index)
    found = near_duplicates(profiles, 0.8)
    assert {near.index for near in found} == expected and expected
    assert all(near.similarity >= 0.8 and near.earlier in kept for near in found)


def test_bundled_training_rows_are_no_copies_of_evaluated_ones() -> None:
    """Templates make rows alike; the rules must not take them for that. A planted copy is found."""
    train = load_items("ko_text2sql:train", 600)
    evaluated = load_items("ko_text2sql:dev") + load_items("ko_text2sql:test")
    profiles = [profile(item) for item in train]
    check = Leakage(evaluated, 0.8)
    assert [reason for one in profiles if (reason := check.reason(one))] == []
    assert exact_duplicates(profiles) == {} and near_duplicates(profiles, 0.9) == []
    for item in evaluated[::40]:
        assert check.reason(
            profile(replace(item, question=f"{item.question} 부탁해요", db_id="x", database=None))
        )
