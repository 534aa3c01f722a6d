"""Cleaning with real SQLite files and a real sandbox: each rule, their order, their counts, their independence."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.errors import DataError, RecipeError
from quantlab.runs.run import read_jsonl
from quantlab.text2sql.cleaning.empty_tables import run_on_empty_tables
from quantlab.text2sql.cleaning.filters import ORDER, Rejected, clean, summary_table, write_rejected
from quantlab.text2sql.cleaning.rules import RULES, Unchecked, binds, judge, parses, select
from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.teaching.judge import Verdict

DDL = "CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT, price INTEGER, note TEXT);"
ALL = ["parses", "select", "binds", "executes", "returns"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db") / "books.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(DDL + "INSERT INTO books VALUES (1, '가', 100, NULL), (2, '나', 200, NULL);")
    connection.close()
    return path


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=2.0, steps=2_000_000), workers=2) as workers:
        yield workers


def item(sql: str, name: str = "1", database: Path | None = None, question: str = "", ddl: str = DDL) -> Item:
    return Item(name, "2", ddl, question or f"질문 {name}?", sql, database)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT title FROM books", None),
        ("SELECT title FROM books;", None),
        ("-- 책\nSELECT 1; -- 끝", None),
        ("DROP TABLE books", None),
        ("SELECT title FROM books WHERE price = = 3", "line 1, column 39: Required keyword"),
        ("SELECT title FROM (books", "line 1, column 24: Expecting )"),
        ("SELECT 'abc", "not SQL"),
        ("", "no statement"),
        (" ; ", "no statement"),
        ("-- 아무것도", "no statement"),
        ("SELECT 1\x00", "NUL"),
        ("SELECT " + "1," * 20_000 + "1", "longer than"),
        ("SELECT " + "(" * 6000 + "1" + ")" * 6000, "nested too deeply"),
    ],
)
def test_parses(sql: str, words: str | None) -> None:
    found = parses(item(sql))
    assert found is None if words is None else words in str(found)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT 1", None),
        ("WITH a AS (SELECT 1) SELECT * FROM a", None),
        ("SELECT 1 UNION SELECT 2", None),
        ("(SELECT 1) EXCEPT SELECT 2", None),
        ("(SELECT 1)", None),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT 1; DROP TABLE books;", "2 statements"),
        ("", "no statements"),
        ("INSERT INTO books VALUES (1)", "INSERT where a SELECT"),
        ("WITH a AS (SELECT 1) DELETE FROM books", "DELETE where a SELECT"),
        ("PRAGMA table_info(books)", "PRAGMA where a SELECT"),
        ("EXPLAIN SELECT 1", "EXPLAIN where a SELECT"),
        ("VACUUM", "where a SELECT"),
        ("VALUES (1)", "VALUES where a SELECT"),
        ("CREATE TABLE x AS SELECT 1", "CREATE where a SELECT"),
        ("SELECT * INTO x FROM books", "INTO inside"),
        ("ATTACH 'x' AS y", "ATTACH where a SELECT"),
        ("SELECT (", "does not parse"),
    ],
)
def test_select(sql: str, words: str | None) -> None:
    found = select(item(sql))
    assert found is None if words is None else words in str(found)


def test_binds_needs_a_readable_ddl() -> None:
    assert binds(item("SELECT titel FROM books")) == "no column titel; did you mean title?"
    assert binds(item("SELECT 1", ddl="표: 책")) == Unchecked("the DDL cannot be read")
    assert binds(item("DROP TABLE books")) == "it is not one query that parses"


def test_judge_rule() -> None:
    assert judge(item(""), Verdict(True, "맞음")) is None
    assert judge(item(""), Verdict(False, "열이 다름")) == "열이 다름"
    assert judge(item(""), Verdict(False, "")) == "the judge says no"
    assert judge(item(""), None) == "no verdict"


def rows(database: Path) -> list[Item]:
    """One row for each way through the rules."""
    return [
        item("SELECT title FROM books", "good", database),
        item("SELECT title FROM", "syntax", database),
        item("DELETE FROM books", "delete", database),
        item("SELECT pages FROM books", "names", database),
        item("select T1.title from books as T1;", "again", database, question="질문 good"),
        item("SELECT nosuch(title) FROM books", "function", database),
        item("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT MAX(n) FROM c", "endless", database),
        item("SELECT title FROM books WHERE price > 900", "no rows", database),
        item("SELECT note FROM books", "only null", database),
        item("SELECT price FROM books", "leak", database),
        item("SELECT title, price FROM books", "long", database, question="모든 도서의 제목과 가격을 함께 보여 줘"),
        item("SELECT title, price FROM books", "near", database, question="모든 도서의 제목과 가격을 함께 보여 줘요"),
        item("SELECT COUNT(*) FROM books", "judged no", database),
        item("SELECT MAX(price) FROM books", "unjudged", database),
        item("SELECT MIN(price) FROM books WHERE note IS NULL", "empty tables", question="다른 곳의 질문"),
        item("SELECT DATE_FORMAT(a, '%Y') FROM m", "elsewhere", ddl="CREATE TABLE m (a INT AUTO_INCREMENT)"),
    ]  # fmt: skip


def test_every_rule_takes_its_row(database: Path, sandbox: Sandbox) -> None:
    given = rows(database)
    asked: list[str] = []

    def verdicts(left: Sequence[Item]) -> dict[str, Verdict]:
        asked.extend(row.id for row in left)
        return {
            row.id: Verdict(row.id != "judged no", "개수가 아니다") for row in left if row.id != "unjudged"
        }

    result = clean(
        given,
        ["judge", *ALL],
        evaluated=[item("SELECT price FROM books", "test-9", database, question="가격은?")],
        verdicts=verdicts,
        sandbox=sandbox,
    )
    assert {(row.item.id, row.rule) for row in result.rejected} == {
        ("syntax", "parses"), ("delete", "select"), ("names", "binds"), ("again", "duplicate"),
        ("function", "executes"), ("endless", "executes"), ("no rows", "returns"), ("only null", "returns"),
        ("leak", "leakage"), ("near", "near_duplicate"), ("judged no", "judge"), ("unjudged", "judge"),
    }  # fmt: skip
    assert [row.id for row in result.kept] == ["good", "long", "empty tables", "elsewhere"]
    assert list(result.counts) == list(ORDER)
    assert result.counts["executes"] == 2 and result.counts["judge"] == 2
    assert result.unchecked == {"executes": 1, "returns": 2}
    assert asked == ["good", "long", "judged no", "unjudged", "empty tables", "elsewhere"], (
        "only good rows are paid"
    )
    reasons = {row.item.id: row.reason for row in result.rejected}
    assert reasons["function"] == "no such function: nosuch"
    assert reasons["again"] == "the same as row good"
    assert reasons["leak"] == "its query is that of the evaluated item test-9"
    assert reasons["near"].startswith("similarity 0.9") and reasons["near"].endswith("row long")
    assert result.total == len(given)


def test_order_of_rules_and_number_of_workers_do_not_matter(database: Path, sandbox: Sandbox) -> None:
    given = rows(database)
    first = clean(given, ALL, sandbox=sandbox)
    with Sandbox(sandbox.limits, workers=1) as alone:
        second = clean(given, list(reversed(ALL)), sandbox=alone)
    assert first == second
    assert clean(given, ALL).counts == first.counts  # a sandbox of its own


def test_dedup_off_and_no_rules(database: Path) -> None:
    given = [
        item("SELECT title FROM books", "a", question="q"),
        item("SELECT title FROM books", "b", question="q"),
    ]
    assert clean(given, [], dedup=False).kept == given
    assert clean(given, []).counts == {"duplicate": 1, "leakage": 0, "near_duplicate": 0}
    assert clean([], ALL).kept == []
    leaking = clean(given, [], dedup=False, evaluated=given[:1])
    assert leaking.kept == [] and leaking.counts == {"leakage": 2}, "leakage is always on"


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="execute") as caught:
        clean([], ["execute"])
    assert "executes" in caught.value.hint
    with pytest.raises(RecipeError, match="judge"):
        clean([], ["judge"])
    broken = tmp_path / "broken.sqlite"
    broken.write_bytes(b"no database" * 500)
    with pytest.raises(DataError, match="row 7"):
        clean([item("SELECT 1", "7", broken)], ["executes"])


def test_rules_are_named_as_in_recipes() -> None:
    from quantlab.recipe.distill import Filter

    assert set(RULES) == set(Filter.__args__)  # type: ignore[attr-defined]
    assert [name for name in ORDER if name in RULES] == list(RULES)


@pytest.mark.parametrize(
    "attack",
    [
        "ATTACH '{path}' AS x; CREATE TABLE x.t (a);",
        "VACUUM INTO '{path}';",
        "CREATE TABLE t (a); INSERT INTO t VALUES (1);",
        "CREATE TABLE t AS SELECT 1 AS a;",
        "CREATE TABLE t (a); PRAGMA writable_schema = 1;",
        "CREATE VIRTUAL TABLE t USING fts5(a);",
        "CREATE TABLE t (a); CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT load_extension('x'); END;",
        "SELECT load_extension('{path}');",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT COUNT(*) FROM c;",
        "CREATE TABLE t (a); DROP TABLE t;",
        "CREATE TABLE t (a INT AUTO_INCREMENT)",
        "CREATE TABLE t (a ENUM ('x', 'y'))",
        "no DDL",
        "",
        "CREATE TABLE t (a" + ", a" * 100_000,
        "\x00",
        "\ud800",
    ],
)
def test_ddl_that_does_more_than_define_tables(attack: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    row = replace(
        item("SELECT COUNT(*) FROM t", "x"), context=attack.replace("{path}", str(target)), database=None
    )
    with Sandbox(workers=1) as sandbox:
        (found,) = run_on_empty_tables(sandbox, [row])
    assert found is None or found.rows == ((0,),)
    assert list(tmp_path.iterdir()) == []


def test_empty_tables_with_checks_defaults_and_keys() -> None:
    ddl = (
        "CREATE TABLE a (x INTEGER PRIMARY KEY AUTOINCREMENT, y TEXT DEFAULT (lower('A')) CHECK (length(y) > 1),"
        " z INTEGER REFERENCES elsewhere(id)); -- 주석\nCREATE UNIQUE INDEX i ON a (y);"
    )
    rows = [
        replace(item(sql, "x"), context=ddl, database=None) for sql in ("SELECT y FROM a", "SELECT q FROM a")
    ]
    with Sandbox(workers=1) as sandbox:
        good, bad = run_on_empty_tables(sandbox, rows)
    assert good is not None and good.status == "rows" and bad is not None and "no such column" in bad.reason


def test_what_only_another_dialect_reads_parses() -> None:
    assert parses(item("SELECT GROUP_CONCAT(title SEPARATOR ', ') FROM books", "x")) is None
    assert "line 1" in str(parses(item("SELECT (title FROM books", "x")))


def test_rows_of_another_dialect_are_run_too() -> None:
    ddl = "CREATE TABLE `users` (`id` INT AUTO_INCREMENT PRIMARY KEY, `joined` DATETIME NOT NULL) ENGINE=InnoDB;"
    answers = {
        "SELECT COUNT(*) FROM users WHERE joined >= DATE_SUB(CURDATE(), INTERVAL 1 MONTH)": "rows",
        "SELECT nosuch FROM users": "error",
        "SELECT STDDEV(id) FROM users": None,
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r": "timeout",
        "SELECT YEAR(joined) FROM users": "rows",
    }
    rows = [replace(item(sql, "x"), context=ddl, database=None) for sql in answers]
    with Sandbox(Limits(seconds=1.0, steps=2_000_000), workers=1) as sandbox:
        found = run_on_empty_tables(sandbox, rows)
    assert [execution.status if execution is not None else None for execution in found] == list(
        answers.values()
    )


def test_rejected_rows_are_written_down(tmp_path: Path) -> None:
    lone = replace(item("SELECT \ud800", "x"), extra={"level": "easy", "other": object()})
    path = tmp_path / "rejected.jsonl"
    assert write_rejected(path, [Rejected(lone, "parses", "line 1 \udfff")]) == 1
    (row,) = read_jsonl(path)
    assert row["rule"] == "parses" and row["level"] == "easy" and row["answer"] == "SELECT ?"
    assert "/" not in json.dumps({**row, "answer": ""}), "no path of this machine"


def test_summary() -> None:
    text = summary_table({"parses": 12, "executes": 1000}, 9800, {"executes": 3})
    assert text.splitlines() == [
        "rule      taken   left  unchecked",
        "                 9,800",
        "parses       12  9,788",
        "executes  1,000  8,788          3",
    ]


def test_bundled_rows_all_pass() -> None:
    evaluated = load_items("ko_text2sql:dev") + load_items("ko_text2sql:test")
    result = clean(load_items("ko_text2sql:train", 200), ALL, evaluated=evaluated)
    assert result.rejected == [] and result.unchecked == {}
