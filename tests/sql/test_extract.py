"""Taking SQL out of what models write."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.sql.extract import extract, rest_is_nothing, statement_end

CASES = [
    ("SELECT 1;", "SELECT 1;", True),
    ("  \nSELECT a FROM t;\n", "SELECT a FROM t;", True),
    ("SELECT a FROM t WHERE b = 'x;y'; SELECT 2;", "SELECT a FROM t WHERE b = 'x;y';", True),
    ("SELECT 'it''s; ok' /* ; */ -- ;\n FROM t;", "SELECT 'it''s; ok' /* ; */ -- ;\n FROM t;", True),
    ('SELECT `a;b`, [c;d], "e;f" FROM t; x', 'SELECT `a;b`, [c;d], "e;f" FROM t;', True),
    ("Here is the query:\n```sql\nSELECT a\nFROM t;\n```\nIt works.", "SELECT a\nFROM t;", True),
    ("```\nSELECT a FROM t\n```", "SELECT a FROM t", False),
    ("Select the names:\n```sql\nselect n from t;\n```", "select n from t;", True),
    (
        "With this in mind:\n```\nWITH c AS (SELECT 1) SELECT * FROM c\n```",
        "WITH c AS (SELECT 1) SELECT * FROM c",
        False,
    ),
    ("SELECT a FROM t</s>", "SELECT a FROM t", False),
    ("<s> SELECT 1;</s>", "SELECT 1;", True),
    ("SELECT a FROM t\n\n### Question:\n다음 질문", "SELECT a FROM t", False),
    ("SELECT a FROM t\n이 쿼리는 모든 것을 반환합니다.", "SELECT a FROM t", False),
    (
        "SELECT name,\n  age\nFROM t\nWHERE x > 1\nThis query returns",
        "SELECT name,\n  age\nFROM t\nWHERE x > 1",
        False,
    ),
    ("질문에 답하려면 SELECT를 쓰면 됩니다: SELECT a FROM t;", "SELECT a FROM t;", True),
    ("To select players, use:\nselect a from t; -- done", "select a from t;", True),
    (
        "SELECT a\nFROM 플레이어\nWHERE 이름 = '가'\n ORDER BY 나이;",
        "SELECT a\nFROM 플레이어\nWHERE 이름 = '가'\n ORDER BY 나이;",
        True,
    ),
    ("(SELECT a FROM t);", "SELECT a FROM t", False),
    ("DELETE FROM players;", "DELETE FROM players;", True),
    ("SELECT 'never closed ; ", "SELECT 'never closed ;", False),
    ("답을 모르겠습니다.", "", False),
    ("", "", False),
    ("</s>SELECT 1;", "", False),
]


@pytest.mark.parametrize(("text", "statement", "complete"), CASES)
def test_cases(text: str, statement: str, complete: bool) -> None:
    found = extract(text)
    assert (found.statement, found.complete) == (statement, complete)


def test_what_was_cut_is_kept() -> None:
    found = extract("정답:\nSELECT 1; SELECT 2;")
    assert (found.before, found.statement, found.after) == ("정답:\n", "SELECT 1;", " SELECT 2;")


def test_stopping_by_itself() -> None:
    assert rest_is_nothing(extract("SELECT 1;</s>").after)
    assert rest_is_nothing(extract("```sql\nSELECT 1;\n```\n").after)
    assert not rest_is_nothing(extract("SELECT 1;\n### Question:").after)


def test_end_is_found_when_no_more_text_can_change_it() -> None:
    assert statement_end("SELECT a FROM t") is None
    assert statement_end("SELECT ';") is None
    assert statement_end("SELECT a FROM t; and") == len("SELECT a FROM t;")
    assert statement_end("SELECT a FROM t\n###") == len("SELECT a FROM t")
    assert statement_end("To select players\n- first") is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="SELECT from;'\"`-/*#()[]\n가나<s>\\x00", max_size=60))
def test_never_raises_and_loses_nothing(text: str) -> None:
    found = extract(text)
    if found.statement:
        assert found.statement in text
        assert found.before + found.statement in text.replace("\n", "\n")
    else:
        assert found.before + found.after == text
    statement_end(text)
