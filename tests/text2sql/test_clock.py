"""The clock of SQLite queries stands still, and nothing else in them changes."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.dialects.clock import CLOCK, fix_clock
from quantlab.text2sql.dialects.transpile import Translation, to_sqlite

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text2sql"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1", "select  *\nfrom t -- it is now or never, date()\n", "SELECT date(d), time(d, '+1 hour')"
        " FROM t", "SELECT '",
        "SELECT t.current_date FROM t", "SELECT 1 AS current_date", "SELECT a current_timestamp FROM t", "", ";",
        "SELECT (((",
        "SELECT \"current_date\", [current_time], `now` FROM t", "SELECT * FROM current_date",
        "SELECT 'date(''now'')'",
        "SELECT now FROM t WHERE note = 'now'", "SELECT strftime('now', d) FROM t", "SELECT date(now) FROM t",
        "NOW()",
        "SELECT date(CASE WHEN a = 'now' THEN d END) FROM t", "WITH current_date AS (SELECT 1) SELECT *"
        " FROM current_date",
        "SELECT /* date('now') */ 1", "SELECT x'6e6f77'", "SELECT \x00 date('now", "DROP TABLE now",
        "SELECT '\ud800', date(d)",
    ],
)  # fmt: skip
def test_sqlite_queries_come_back_as_they_are(sql: str) -> None:
    assert to_sqlite(sql) == Translation(sql)


@pytest.mark.parametrize(
    ("sql", "answer"),
    [
        ("SELECT date('now')", "2024-07-01"), ("SELECT DATETIME ( 'NOW' )", "2024-07-01 12:00:00"),
        ("SELECT date()", "2024-07-01"), ("SELECT time( /* now */ )", "12:00:00"), ("SELECT julianday()", 2460493.0),
        ("SELECT strftime('%Y')", "2024"), ("SELECT strftime('%s', 'now')", "1719835200"),
        ("SELECT unixepoch()", 1719835200), ("SELECT date(\"now\")", "2024-07-01"), ("SELECT CURRENT_DATE",
         "2024-07-01"),
        ("SELECT date('now', 'start of month', '-1 month')", "2024-06-01"), ("SELECT current_time", "12:00:00"),
        ("SELECT datetime('now', 'localtime')", "2024-07-01 12:00:00"), ("SELECT date(('now'))", "2024-07-01"),
        ("SELECT date(coalesce(NULL, 'now'))", "2024-07-01"), ("SELECT date(CASE WHEN 1 THEN 'now' END)",
         "2024-07-01"),
        ("SELECT Current_Timestamp", "2024-07-01 12:00:00"), ("SELECT max(current_date, '2000-01-01')", "2024-07-01"),
        ("SELECT CASE WHEN 1 THEN current_date ELSE current_time END", "2024-07-01"), ("SELECT -current_date", -2024),
        ("SELECT a FROM (SELECT current_date AS a) WHERE a = date() AND a BETWEEN current_date AND date('now')",
         "2024-07-01"),
        ("SELECT date('now', '-' || (1) || ' day')", "2024-06-30"), ("SELECT '김' || date('now')", "김2024-07-01"),
        ("SELECT 'x' GLOB current_date", 0), ("SELECT current_date AS current_date", "2024-07-01"),
    ],
)  # fmt: skip
def test_the_clock_of_sqlite_queries_stands_still(
    database: sqlite3.Connection, sql: str, answer: Any
) -> None:
    translation = to_sqlite(sql)
    assert translation.changed and sqlite3.connect(":memory:").execute(translation.sql).fetchall() == [
        (answer,)
    ]


def test_the_clock_can_be_set() -> None:
    assert CLOCK == "2024-07-01 12:00:00"
    assert fix_clock("SELECT date('now')", "2020-02-29 01:02:03") == "SELECT date('2020-02-29 01:02:03')"
    translated = to_sqlite("SELECT CURDATE() - INTERVAL 1 YEAR", "mysql", clock="2020-02-29 01:02:03")
    assert translated.sql == "SELECT '2019-02-28'"
    assert to_sqlite("SELECT NOW()", "mysql", clock="yesterday").sql == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared samples are not here")
@pytest.mark.parametrize("name", ["spider_sample", "defog_sample"])
def test_real_golds_are_left_alone_or_keep_their_result(name: str) -> None:
    """SQLite golds keep their text unless they ask for the time."""
    for item in load_items(str(SHARED / name / "questions.jsonl")):
        for gold in item.golds:
            translation = to_sqlite(gold)
            assert translation.sql == gold or "now" in gold.lower() or "current_" in gold.lower()
