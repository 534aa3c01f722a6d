"""Statements that are refused before they run: writes, the engine's inside, other files, and what is no query."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Sandbox

WRITES = [
    "DELETE FROM players",
    "DELETE FROM players RETURNING *",
    "UPDATE players SET level = 0",
    "UPDATE players SET level = (SELECT 1) WHERE 0",
    "INSERT INTO players (name, level) VALUES ('x', 1)",
    "INSERT INTO players (name, level) SELECT name, 1 FROM players RETURNING name",
    "INSERT INTO players (name, level) VALUES ('x', 1) ON CONFLICT DO NOTHING",
    "REPLACE INTO players (player_id, name, level) VALUES (1, 'x', 1)",
    "WITH c AS (SELECT 1) DELETE FROM players",
    "WITH c AS (SELECT 1) UPDATE players SET level = 1 RETURNING *",
    "DROP TABLE players",
    "DROP TABLE IF EXISTS players",
    "DROP TABLE sqlite_master",
    "ALTER TABLE players RENAME TO gone",
    "ALTER TABLE players RENAME COLUMN name TO n",
    "ALTER TABLE players ADD COLUMN z",
    "ALTER TABLE players DROP COLUMN level",
    "CREATE TABLE x (a)",
    "CREATE TABLE x AS SELECT * FROM players",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE INDEX i ON players (name)",
    "CREATE VIEW v AS SELECT 1",
    "CREATE TEMP VIEW v AS SELECT 1",
    "CREATE TRIGGER g AFTER INSERT ON players BEGIN DELETE FROM players; END",
    "INSERT INTO sqlite_master VALUES (1, 2, 3, 4, 5)",
    "REINDEX",
    "REINDEX players",
    "ANALYZE",
    "ANALYZE sqlite_master",
    "\ufeffDROP TABLE players",
    "/* SELECT */ -- SELECT\n DROP TABLE players",
]

OUTSIDE = [
    "ATTACH DATABASE '{other}' AS o",
    "ATTACH ':memory:' AS o",
    "ATTACH 'file:{other}?mode=rwc' AS o",
    "DETACH main",
    "VACUUM",
    "VACUUM INTO '{other}'",
    "SELECT load_extension('{other}')",
    "SELECT fts3_tokenizer('simple', x'00')",
    "SELECT fts5_source_id()",
    "SELECT rtreecheck('players')",
    "SELECT sqlite_log(1, 'x')",
    "SELECT sqlite_compileoption_get(1)",
    "CREATE VIRTUAL TABLE v USING fts3(a)",
    "CREATE VIRTUAL TABLE v USING fts5(a)",
    "CREATE VIRTUAL TABLE temp.v USING rtree(a, b, c)",
    "CREATE VIRTUAL TABLE v USING dbstat",
    "CREATE VIRTUAL TABLE v USING csv(filename='/etc/passwd')",
    "CREATE VIRTUAL TABLE v USING zipfile('{other}')",
]

ENGINE = [
    "PRAGMA writable_schema = 1",
    "PRAGMA query_only = 0",
    "PRAGMA/**/query_only=0;",
    "PRAGMA case_sensitive_like = 1",
    "PRAGMA journal_mode = WAL",
    "PRAGMA journal_mode",
    "PRAGMA schema_version = 99",
    "PRAGMA user_version = 9",
    "PRAGMA hard_heap_limit = 0",
    "PRAGMA trusted_schema = 1",
    "PRAGMA temp_store_directory = '/tmp'",
    "PRAGMA wal_checkpoint(TRUNCATE)",
    "PRAGMA integrity_check",
    "PRAGMA optimize",
    "PRAGMA no_such_thing",
    "SELECT * FROM pragma_table_info('players')",
    "SELECT * FROM main.pragma_table_info('players')",
    "SELECT COUNT(*) FROM pragma_database_list",
    "SELECT * FROM temp.pragma_database_list",
    "SELECT * FROM PRAGMA_function_list",
    "SELECT (SELECT COUNT(*) FROM pragma_compile_options)",
    "SELECT * FROM dbstat",
    "SELECT 1 WHERE EXISTS (SELECT * FROM dbstat)",
    "SELECT * FROM sqlite_stmt",
    "SELECT * FROM fts3tokenize('simple', 'x')",
    "EXPLAIN SELECT 1",
    "EXPLAIN DROP TABLE players",
    "EXPLAIN QUERY PLAN DELETE FROM players",
    "/* x */ -- y\n EXPLAIN QUERY PLAN SELECT 1",
    "\ufeffEXPLAIN SELECT 1",
    ";; EXPLAIN SELECT 1",
    "--\n" * 30_000 + "EXPLAIN SELECT 1",
]

TRANSACTIONS = [
    "BEGIN",
    "BEGIN IMMEDIATE",
    "BEGIN EXCLUSIVE",
    "BEGIN; SELECT 1; COMMIT",
    "COMMIT",
    "END",
    "ROLLBACK",
    "ROLLBACK TO s",
    "SAVEPOINT s",
    "RELEASE s",
]

NO_QUERY = [
    ("several", "SELECT 1; DROP TABLE players"),
    ("several", "SELECT 1;;; SELECT 2"),
    ("several", "SELECT 1; x"),
    ("several", "SELECT 1;\nPRAGMA query_only = 0;\nDELETE FROM players"),
    ("empty", ""),
    ("empty", ";"),
    ("empty", "-- nothing"),
    ("empty", "/* EXPLAIN SELECT 1"),
    ("empty", " \n\t" * 30_000),
    ("empty", "\ufeff"),
    ("sql", "SELECT 1\x00; DROP TABLE players"),
    ("sql", "\x00"),
    ("sql", "\udcff\udcfe"),
    ("sql", b"\xff\xfe\xc3\x28 SELECT 1".decode("utf-8", "surrogateescape")),
    ("sql", "\ufffe"),
    ("sql", "SELECT\u200b 1"),
    ("sql", "\u200bSELECT 1"),
    ("sql", "SELECT \u202e1"),
    ("sql", "ＳＥＬＥＣＴ 1"),
    ("sql", "\u3000EXPLAIN SELECT 1"),
    ("sql", "💥"),
    ("sql", "선수의 이름을 알려줘"),
    ("sql", "SELECT 'unclosed"),
    ("sql", '"'),
    ("sql", "SELECT 1 SELECT 2"),
    ("sql", "SELECT ?"),
    ("sql", "SELECT ?250000"),
    ("sql", "SELECT :a, @b, $c"),
    ("sql", "SELECT name INTO OUTFILE '/tmp/x' FROM players"),
    ("sql", "LOAD DATA INFILE '/etc/passwd' INTO TABLE players"),
    ("sql", "COPY players TO '/tmp/x'"),
    ("sql", ".shell ls"),
    ("sql", ".read /etc/passwd"),
    ("sql", "SELECT readfile('/etc/passwd')"),
    ("sql", "SELECT writefile('{other}', 'x')"),
    ("sql", "SELECT edit('x', 'vi')"),
    ("sql", "SELECT * FROM fsdir('/')"),
    ("sql", "SELECT * FROM csv"),
    ("sql", "SELECT * FROM zipfile('{other}')"),
    ("sql", "SELECT * FROM generate_series(1, 10)"),
    ("sql", "SELECT RAISE(ROLLBACK, 'x')"),
    ("sql", "SELECT * FROM (DELETE FROM players RETURNING *)"),
    ("sql", "UPDATE sqlite_master SET sql = ''"),
    ("sql", "DELETE FROM sqlite_master"),
]

REFUSED = [("denied", sql) for sql in WRITES + OUTSIDE + ENGINE + TRANSACTIONS] + NO_QUERY


@pytest.mark.parametrize(("kind", "sql"), REFUSED, ids=[f"{n}-{k}" for n, (k, _) in enumerate(REFUSED)])
def test_is_refused(attack, victim: Path, kind: str, sql: str) -> None:
    # A function that this SQLite was compiled without is unknown to it, which is as good a refusal.
    absent = "|sql" if kind == "denied" and sql.startswith(("SELECT", "CREATE VIRTUAL")) else ""
    attack(victim, sql.replace("{other}", str(victim.parent / "other.sqlite")), kind + absent)


def test_a_reason_does_not_repeat_a_megabyte(attack, victim: Path) -> None:
    assert "no such column: aaaa" in attack(victim, "SELECT " + "a" * 90_000, "sql").reason


def test_what_is_allowed(sandbox: Sandbox, victim: Path) -> None:
    for sql in (
        "WITH c AS (SELECT level FROM players) SELECT COUNT(*) FROM c",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r WHERE x < 9) SELECT COUNT(*) FROM r",
        "WITH pragma_table_info AS (SELECT 1), dbstat AS (SELECT 2) SELECT * FROM pragma_table_info, dbstat",
        "SELECT COUNT(*) FROM json_each('[1, 2]')",
        "SELECT name, RANK() OVER (ORDER BY level) FROM players",
        "SELECT strftime('%Y', '2024-05-01'), date('now'), sqrt(2), upper('a'), '가' || '나', sqlite_version()",
        "VALUES (1), (2)",
        "\ufeffSELECT 1",
        "/**/" * 20_000 + ";SELECT 1",
        "SELECT rowid, 1 AS a, 2 AS a, 3 AS A FROM players",
        "SELECT COUNT(*) FROM sqlite_master;",
        "SELECT x'00ff', 9e999, NULL;  -- and a comment",
    ):
        found = sandbox.run(victim, sql)
        assert found.status == "rows", (sql[:100], found.reason)
    assert sandbox.run(victim, "SELECT x'00ff', 9e999, NULL").rows == ((b"\x00\xff", float("inf"), None),)
    assert sandbox.run(victim, "SELECT 1 AS a, 2 AS a").columns == ("a", "a")


def test_text_that_is_not_utf8_survives_the_pipe(sandbox: Sandbox, victim: Path) -> None:
    assert sandbox.run(victim, "SELECT CAST(x'ff41' AS TEXT), '\u200b', '😀'").rows == (
        ("\udcffA", "\u200b", "😀"),
    )
    assert sandbox.run(victim, "SELECT 'a\ud800b'").rows == (("a?b",),)
