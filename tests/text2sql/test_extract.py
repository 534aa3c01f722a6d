"""Taking SQL out of what models write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.runs.run import read_jsonl
from quantlab.text2sql.extraction.extract import Extraction, extract, rest_is_nothing, statement_end

# (what a model wrote, the statement in it, whether a semicolon ended it)
PLAIN = [
    ("SELECT 1;", "SELECT 1;", True),
    ("  \nSELECT a FROM t;\n", "SELECT a FROM t;", True),
    ("SELECT a FROM t WHERE b = 'x;y'; SELECT 2;", "SELECT a FROM t WHERE b = 'x;y';", True),
    ("SELECT 'it''s; ok' /* ; */ -- ;\n FROM t;", "SELECT 'it''s; ok' /* ; */ -- ;\n FROM t;", True),
    ('SELECT `a;b`, [c;d], "e;f" FROM t; x', 'SELECT `a;b`, [c;d], "e;f" FROM t;', True),
    ("SELECT a FROM t -- 끝;\n;", "SELECT a FROM t -- 끝;\n;", True),
    (
        "SELECT a\nFROM 플레이어\nWHERE 이름 = '가'\n ORDER BY 나이;",
        "SELECT a\nFROM 플레이어\nWHERE 이름 = '가'\n ORDER BY 나이;",
        True,
    ),
    ("DELETE FROM players;", "DELETE FROM players;", True),
    ("SELECT 'never closed ; ", "SELECT 'never closed ;", False),
    ("답을 모르겠습니다.", "", False),
    ("", "", False),
    ("SELECT", "", False),
    ("SELECT name", "SELECT name", False),  # cut off: an error to be seen, not an answer left out
    ("VALUES (1), (2);", "VALUES (1), (2);", True),
    ("SELECT a FROM t; SELECT b FROM t; DROP TABLE t;", "SELECT a FROM t;", True),
    ("DROP TABLE t; SELECT a FROM t;", "DROP TABLE t;", True),
    (
        "WITH c AS (SELECT 1) INSERT INTO t SELECT * FROM c;",
        "WITH c AS (SELECT 1) INSERT INTO t SELECT * FROM c;",
        True,
    ),
    (
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c)\nSELECT x FROM c;",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c)\nSELECT x FROM c;",
        True,
    ),
    ("with c as (select 1)\nSELECT * FROM c;", "with c as (select 1)\nSELECT * FROM c;", True),
    ("select a from t union\nSELECT b FROM u", "select a from t union\nSELECT b FROM u", False),
    (
        "SELECT a FROM players\n  p JOIN teams t ON p.x = t.x;",
        "SELECT a FROM players\n  p JOIN teams t ON p.x = t.x;",
        True,
    ),
]
FENCES = [
    ("Here is the query:\n```sql\nSELECT a\nFROM t;\n```\nIt works.", "SELECT a\nFROM t;", True),
    ("```\nSELECT a FROM t\n```", "SELECT a FROM t", False),
    ("Select the names:\n```sql\nselect n from t;\n```", "select n from t;", True),
    (
        "With this in mind:\n```\nWITH c AS (SELECT 1) SELECT * FROM c\n```",
        "WITH c AS (SELECT 1) SELECT * FROM c",
        False,
    ),
    ("```sqlite\nSELECT a FROM t;\n```", "SELECT a FROM t;", True),
    ("```SQL title=answer\nSELECT a FROM t;\n```", "SELECT a FROM t;", True),
    ("~~~sql\nSELECT a FROM t\n~~~\n끝", "SELECT a FROM t", False),
    ("````sql\nSELECT a FROM t;\n````", "SELECT a FROM t;", True),
    ("```sql SELECT a FROM t; ```", "SELECT a FROM t;", True),
    ("```SELECT a FROM t```", "SELECT a FROM t", False),
    ("```sql\nSELECT a FROM t", "SELECT a FROM t", False),  # never closed
    ("```sql\nSELECT a FROM t```", "SELECT a FROM t", False),
    (
        "```python\nprint(1)\n```\n```sql\nSELECT a FROM t;\n```\n```sql\nSELECT b FROM t;\n```",
        "SELECT a FROM t;",
        True,
    ),
    ("'''sql\nSELECT a FROM t\n'''", "SELECT a FROM t", False),
    ("SELECT '```sql' FROM t;", "SELECT '```sql' FROM t;", True),
    ("> ```sql\n> SELECT a\n> FROM t\n> ```", "SELECT a\nFROM t", False),
    ("> SELECT a\n> FROM t\n> WHERE b > 1;", "SELECT a\nFROM t\nWHERE b > 1;", True),
    ("쿼리는 `SELECT a FROM t` 입니다.", "SELECT a FROM t", False),
    ("Use `SELECT `a` FROM `t`` please", "SELECT `a` FROM `t`", False),
]
MARKERS = [
    ("SELECT a FROM t</s>", "SELECT a FROM t", False),
    ("<s> SELECT 1;</s>", "SELECT 1;", True),
    ("</s>SELECT 1;", "", False),
    ("<|im_start|>assistant\nSELECT a FROM t;<|im_end|>", "SELECT a FROM t;", True),
    ("SELECT a FROM t<|im_start|>user\n다음 질문", "SELECT a FROM t", False),
    ("[INST] 질문 [/INST] select a from t;", "select a from t;", True),
    ("<sql>SELECT a FROM t</sql>", "SELECT a FROM t", False),
    ("\\boxed{SELECT a FROM t}", "SELECT a FROM t", False),
    ("<think>SELECT wrong FROM t;</think>\nSELECT a FROM t;", "SELECT a FROM t;", True),
    ("<thinking>\n```sql\nSELECT wrong;\n```\n</thinking>SELECT a FROM t;", "SELECT a FROM t;", True),
    ("SELECT wrong FROM t; 인가?</think>\n\n```sql\nSELECT a FROM t\n```", "SELECT a FROM t", False),
    ("<think>SELECT wrong FROM t; ...", "", False),
    ("SELECT a FROM t; <think>맞나?</think>", "SELECT a FROM t;", True),
]
PROSE = [
    ("SELECT a FROM t\n\n### Question:\n다음 질문", "SELECT a FROM t", False),
    ("SELECT a FROM t\n이 쿼리는 모든 것을 반환합니다.", "SELECT a FROM t", False),
    ("SELECT a FROM t; 이 쿼리는 모든 a를 보여줍니다.", "SELECT a FROM t;", True),
    (
        "SELECT name,\n  age\nFROM t\nWHERE x > 1\nThis query returns",
        "SELECT name,\n  age\nFROM t\nWHERE x > 1",
        False,
    ),
    ("질문에 답하려면 SELECT를 쓰면 됩니다: SELECT a FROM t;", "SELECT a FROM t;", True),
    ("To select players, use:\nselect a from t; -- done", "select a from t;", True),
    ("Sure! Here is the SQL query you asked for. SELECT a FROM t;", "SELECT a FROM t;", True),
    ("SELECT a FROM t\nExplanation:\n- it selects", "SELECT a FROM t", False),
    ("SELECT a FROM t ORDER BY b DESC\nNote: this sorts", "SELECT a FROM t ORDER BY b DESC", False),
    ("SELECT a FROM t\n**설명** 모든 a", "SELECT a FROM t", False),
    ("SELECT a FROM t\n---\nThis is it", "SELECT a FROM t", False),
    (
        "SELECT a FROM t WHERE b IN (\n  '가'\n)\n이 쿼리는 좋습니다",
        "SELECT a FROM t WHERE b IN (\n  '가'\n)",
        False,
    ),
    (
        "With players as the main table, we count.\nSELECT COUNT(*) FROM players;",
        "SELECT COUNT(*) FROM players;",
        True,
    ),
    ("With the following query we get it: SELECT a FROM t;", "SELECT a FROM t;", True),
    ("Select the names of all players:\nSELECT name FROM players;", "SELECT name FROM players;", True),
    (
        "Select name and age from players.\nSELECT name, age FROM players;",
        "SELECT name, age FROM players;",
        True,
    ),
    (
        "Select all names from the players table\n\nselect name from players",
        "select name from players",
        False,
    ),
    ("Explain the query.\nSELECT a FROM t", "SELECT a FROM t", False),
    ("Create a table of names:\nSELECT a FROM t", "SELECT a FROM t", False),
    ("SELECT 문을 사용합니다.\n\nSELECT a FROM t;", "SELECT a FROM t;", True),
    ("SELECT 문을 사용합니다.", "", False),
    ("select는 조회입니다", "", False),
    ("The SELECT, FROM and WHERE clauses are used.", "", False),
    ("`SELECT`를 쓰면 됩니다: SELECT a FROM t;", "SELECT a FROM t;", True),
    ("Update the table set below", "", False),
    (
        "SELECT name\n이름을 고릅니다.\nFROM players\n선수 테이블에서 가져옵니다\nWHERE score > 3;",
        "SELECT name\nFROM players\nWHERE score > 3;",
        True,
    ),
    ("SELECT name\nFROM players\n모든 선수입니다\n감사합니다", "SELECT name\nFROM players", False),
    (
        "SELECT a -- 이름\nFROM t -- 선수\nWHERE b > 3;",
        "SELECT a -- 이름\nFROM t -- 선수\nWHERE b > 3;",
        True,
    ),
    ("-- 모든 선수\nSELECT a FROM t;", "SELECT a FROM t;", True),
    ("/* SELECT wrong FROM t;\nSELECT wrong; */\nSELECT a FROM t;", "SELECT a FROM t;", True),
    ("-- SELECT wrong FROM t;\n-- SELECT wrong;", "", False),
    ("# comment\nSELECT a FROM t;", "SELECT a FROM t;", True),
]
WRAPPED = [
    ("(SELECT a FROM t);", "SELECT a FROM t", False),
    ("((SELECT a FROM t))", "SELECT a FROM t", False),
    (
        "(SELECT a FROM t) UNION (SELECT b FROM u) ORDER BY 1;",
        "(SELECT a FROM t) UNION (SELECT b FROM u) ORDER BY 1;",
        True,
    ),
    ("SQL: select a from t;", "select a from t;", True),
    ("**SQL:** `select a from t`", "select a from t", False),
    ("SQL 쿼리：SELECT a FROM t", "SELECT a FROM t", False),
    ("정답: SELECT a FROM t\n설명: 이것은", "SELECT a FROM t", False),
    ("1. SELECT a FROM t;\n2. SELECT b FROM t;", "SELECT a FROM t;", True),
    ("sqlite> select a from t;", "select a from t;", True),
    ("| 질문 | SQL |\n|---|---|\n| 모두 | SELECT a || b FROM t |\n| 둘 | x |", "SELECT a || b FROM t", False),
    ("SELECT a FROM t\n| a |\n|---|\n| 1 |", "SELECT a FROM t", False),
    ("The query is \"SELECT a FROM t WHERE b = 'x'\".", "SELECT a FROM t WHERE b = 'x'", False),
    ("“SELECT a FROM t”라고 쓰면 됩니다", "SELECT a FROM t", False),
    ('query = """\nSELECT a\nFROM t\n"""\nprint(query)', "SELECT a\nFROM t", False),
    ("cursor.execute(\"SELECT a FROM t WHERE b = 'c'\")", "SELECT a FROM t WHERE b = 'c'", False),
    ('{"sql": "SELECT a FROM t WHERE b = \'x\'"}', "SELECT a FROM t WHERE b = 'x'", False),
    ('{"sql": "SELECT \\"a\\"\\nFROM t;", "why": "c"}', 'SELECT "a"\nFROM t;', True),
    ('```json\n{"thought": "SELECT 문", "query": "SELECT a FROM t"}\n```', "SELECT a FROM t", False),
    ('{"answer": "```sql\\nSELECT a FROM t;\\n```"}', "SELECT a FROM t;", True),
    ('{"sql": "SELECT a FROM t WHERE b =', "SELECT a FROM t WHERE b =", False),
    ('{"sql": "SELECT a\nFROM t"}', "SELECT a\nFROM t", False),
]
CHARACTERS = [
    ("SELECT a\r\nFROM t\r\nWHERE b = 1;\r\n설명", "SELECT a\r\nFROM t\r\nWHERE b = 1;", True),
    ("```sql\r\nSELECT a\r\nFROM t\r\n```\r\n", "SELECT a\r\nFROM t", False),
    ("SELECT\u00a0a FROM\u00a0t WHERE b = 'x\u00a0y';", "SELECT a FROM t WHERE b = 'x\u00a0y';", True),
    ("SELECT\u3000a FROM t；다음", "SELECT a FROM t", False),
    ("\ufeffSELECT a FROM\u200b t;", "SELECT a FROM  t;", True),
    ("（SELECT a FROM t）", "SELECT a FROM t", False),
    ("SELECT COUNT（*） FROM t;", "SELECT COUNT（*） FROM t;", True),  # not repaired: SQLite will refuse it
    ("SELECT a FROM t WHERE b = '１２３；';", "SELECT a FROM t WHERE b = '１２３；';", True),
]
CASES = [*PLAIN, *FENCES, *MARKERS, *PROSE, *WRAPPED, *CHARACTERS]


@pytest.mark.parametrize(("text", "statement", "complete"), CASES)
def test_cases(text: str, statement: str, complete: bool) -> None:
    found = extract(text)
    assert (found.statement, found.complete) == (statement, complete)
    check(text, found)


def check(text: str, found: Extraction) -> None:
    """Nothing is lost, and the statement is its own statement."""
    if "\\" not in text:  # the escapes of JSON are gone from the statement
        assert bare(put_back(found)) == bare(text)
    assert extract(found.statement).statement == found.statement


def put_back(found: Extraction) -> str:
    middle = found.statement
    for offset, cut in reversed(found.inside):
        middle = middle[:offset] + cut + middle[offset:]
    return found.before + middle + found.after


def bare(text: str) -> str:
    return re.sub("[\\s\u200b-\u200d\u2060\ufeff]", "", text)


def test_what_was_cut_is_kept() -> None:
    found = extract("정답:\nSELECT 1; SELECT 2;")
    assert (found.before, found.statement, found.after) == ("정답:\n", "SELECT 1;", " SELECT 2;")
    found = extract("SELECT a\n이름을 고릅니다.\nFROM t;")
    assert found.inside == ((9, "이름을 고릅니다.\n"),)
    found = extract('{"sql": "SELECT \\"a\\";", "why": "x"}')
    assert (found.before, found.after) == ('{"sql": "', '", "why": "x"}')


def test_stopping_by_itself() -> None:
    assert rest_is_nothing(extract("SELECT 1;</s>").after)
    assert rest_is_nothing(extract("```sql\nSELECT 1;\n```\n").after)
    assert rest_is_nothing(extract("~~~\nSELECT 1;\n~~~").after)
    assert rest_is_nothing(extract('{"sql": "SELECT 1;"}').after)
    assert rest_is_nothing(extract("<sql>SELECT 1;</sql>").after)
    assert not rest_is_nothing(extract("SELECT 1;\n### Question:").after)
    assert not rest_is_nothing(extract('{"sql": "SELECT 1;", "why": "x"}').after)


def test_end_is_found_when_no_more_text_can_change_it() -> None:
    assert statement_end("SELECT a FROM t") is None
    assert statement_end("SELECT ';") is None
    assert statement_end("SELECT a FROM t; and") == len("SELECT a FROM t;")
    assert statement_end("SELECT a FROM t\n###") == len("SELECT a FROM t")
    assert statement_end("To select players\n- first") is None
    assert statement_end("<think>SELECT a FROM t; and") is None
    assert statement_end("/* SELECT a FROM t; and") is None
    assert statement_end('{"sql": "SELECT 1; ') is None
    assert statement_end('{"sql": "SELECT 1;"}') == len('{"sql": "SELECT 1;')
    assert statement_end("(SELECT a FROM t) U") is None


# That it was reasoning shows only afterwards, where the prompt opened the tag.
UNFORESEEABLE = ("SELECT wrong FROM t; 인가?</think>",)


@pytest.mark.parametrize("text", [text for text, *_ in CASES if not text.startswith(UNFORESEEABLE)])
def test_generation_stops_with_the_statement_of_the_whole(text: str) -> None:
    """Fed one character at a time: where it may stop, what is there is what would be taken in the end."""
    for length in range(len(text) + 1):
        if statement_end(text[:length]) is not None:
            assert extract(text[:length]).statement == extract(text).statement
            break


def test_what_models_wrote_gives_the_statements_it_gave() -> None:
    """Outputs of the embedded model in thirteen formats, with what was scored of them when they were measured."""
    rows = read_jsonl(Path(__file__).with_name("outputs.jsonl"))
    assert len(rows) == 160
    for row in rows:
        found = extract(row["output"])
        assert (found.statement, found.before, found.after) == (row["sql"], row["before"], row["after"])


FRAGMENTS = [
    "SELECT", "select", "Select", " a", " b", " FROM t", " from t", "\n", "\r\n", ";", "'", '"', "`", "```", "```sql\n",
    "~~~", "--", "/*", "*/", "(", ")", "[", "]", "{", "}", '{"sql": "', '"}', "\\n", '\\"', "|", "<think>", "</think>",
    "</s>", "<|im_start|>", "#", "### SQL:", "이름을 고릅니다", " UNION ", "WHERE x = 1", "WITH c AS (", "> ", "- ",
    "1. ", "SQL: ", "\u00a0", "\u200b", "；", "（", "）", ":", ".", ",", " the players", "BEGIN", "DROP TABLE t",
    "VALUES (1)", "\x00", "---\n", "| a |", "가", "'''\n", '"""\n', "EXPLAIN ", "INSERT INTO t ",
]  # fmt: skip
WRITTEN = st.lists(st.sampled_from(FRAGMENTS + [text for text, *_ in CASES]), max_size=12).map("".join)


@settings(max_examples=400)
@given(st.one_of(WRITTEN, st.text(max_size=60)))
def test_any_text_never_raises_loses_nothing_and_is_extracted_once(text: str) -> None:
    check(text, extract(text))
    statement_end(text)
    rest_is_nothing(text)


@pytest.mark.parametrize(
    "unit",
    ["SELECT ", "`", "```sql\n", "<s>", "/*", "(SELECT ", '"sql": "', '"sql": "SELECT 1" ', "Select the x\n", "WITH ",
     "<think>", "[", "'", "SELECT a\n", "SQL:", "\\", "> b,\n", "가 나\n", "1. ", "---\n"],
)  # fmt: skip
def test_text_made_to_take_long_is_read_all_the_same(unit: str) -> None:
    """Patterns with two ways to read a unit would try 2 to the power of 4000, and a reader that calls itself would
    be 4000 deep."""
    check(unit * 200, extract(unit * 200))
    extract("SELECT a FROM t\n" + unit * 4000)
    statement_end("> SELECT a\n" + unit * 4000)
