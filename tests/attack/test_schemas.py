"""Databases whose schema is the attack: views without end, virtual tables, names of the engine, a forged schema."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

HANG = "instr(hex(zeroblob({n})), hex(zeroblob({n} / 2)) || '1')"
SLOW = HANG.format(n="a").replace("'", "''")


def build(path: Path, script: str, forgery: str = "") -> Path:
    connection = sqlite3.connect(path)
    try:
        connection.executescript(f"PRAGMA synchronous = OFF; BEGIN; {script}; COMMIT;")
        if forgery:
            connection.executescript(f"PRAGMA writable_schema = ON; {forgery}")
    except sqlite3.OperationalError as error:
        if "no such module" not in str(error):
            raise
        pytest.skip(str(error))
    finally:
        connection.close()
    return path


def chain(step: str, times: int) -> str:
    views = "".join(f"CREATE VIEW v{i} AS {step.format(v=f'v{i - 1}')};" for i in range(1, times + 1))
    return f"CREATE TABLE v0 (a); {views}"


SCHEMAS: list[tuple[str, str, str]] = [
    # Views
    ("sql", "CREATE VIEW a AS SELECT * FROM b; CREATE VIEW b AS SELECT * FROM a", "SELECT * FROM a"),
    (
        "steps",
        "CREATE VIEW v AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT x FROM r",
        "SELECT COUNT(*) FROM v",
    ),
    ("seconds", f"CREATE VIEW v AS SELECT {HANG.format(n=450000)} AS x", "SELECT x FROM v"),
    ("memory|seconds|sql", chain("SELECT x.a FROM {v} x, {v} y", 39), "SELECT * FROM v39"),
    ("memory|seconds|sql", chain("SELECT MAX(a) AS a FROM {v} UNION SELECT 1 FROM {v}", 39), "SELECT * FROM v39"),
    ("seconds|sql|crash|rows", chain("SELECT * FROM {v}", 2000), "SELECT * FROM v2000"),
    ("sql|denied", "CREATE VIEW v AS SELECT load_extension('x') AS a", "SELECT a FROM v"),
    ("sql|denied", "CREATE VIEW v AS SELECT * FROM pragma_compile_options", "SELECT * FROM v"),
    ("sql|denied", "CREATE VIEW v AS SELECT fts3_tokenizer('simple') AS a", "SELECT a FROM v"),
    # Virtual tables that lie in the file
    ("denied", "CREATE VIRTUAL TABLE f USING fts5(a); INSERT INTO f VALUES ('x')", "SELECT * FROM f WHERE f MATCH 'x'"),
    ("denied", "CREATE VIRTUAL TABLE f USING fts3(a)", "SELECT * FROM f"),
    ("denied", "CREATE VIRTUAL TABLE r USING rtree(i, a, b)", "SELECT * FROM r"),
    ("denied", "CREATE VIRTUAL TABLE d USING dbstat", "SELECT * FROM d"),
    # Names of the engine: the file's own table is read, the engine's is not
    ("rows", "CREATE VIEW json_each AS SELECT 1 AS x", "SELECT x FROM json_each"),
    ("rows", "CREATE TABLE pragma_table_info (x)", "SELECT x FROM pragma_table_info"),
    ("denied", "CREATE TABLE pragma_table_info (x)", "SELECT * FROM temp.pragma_table_info('pragma_table_info')"),
    ("rows", "CREATE TABLE dbstat (x)", "SELECT x FROM dbstat"),
    ("denied|sql", "CREATE TABLE dbstat (x)", "SELECT * FROM temp.dbstat"),
    ("rows", "CREATE VIEW pragma_database_list AS SELECT 1 AS x", "SELECT x FROM pragma_database_list"),
    # Expressions in the schema
    (
        "seconds",
        "CREATE TABLE t (a, b GENERATED ALWAYS AS (a + 0)); INSERT INTO t (a) VALUES (450000);"
        "PRAGMA writable_schema = ON;"
        f"UPDATE sqlite_master SET sql = replace(sql, 'a + 0', '{SLOW}')",
        "SELECT b FROM t",
    ),
    (
        "rows",
        f"CREATE TABLE t (a CHECK ({HANG.format(n='a')} >= 0)); INSERT INTO t VALUES (2);"
        "CREATE INDEX i ON t (hex(zeroblob(a)))",
        "SELECT a FROM t WHERE hex(zeroblob(a)) = '0000'",
    ),
    (
        "denied",
        "CREATE TABLE t (a); CREATE VIEW v AS SELECT * FROM t;"
        "CREATE TRIGGER g INSTEAD OF INSERT ON v BEGIN DELETE FROM t; END",
        "INSERT INTO v VALUES (1)",
    ),
    ("rows", f"CREATE TABLE t (a DEFAULT ('{'x' * 200_000}')); INSERT INTO t VALUES (1)", "SELECT a FROM t"),
    ("rows", "CREATE TABLE t (" + ", ".join(f"열{i}" for i in range(1900)) + ")", "SELECT * FROM t"),
    ("rows", "".join(f"CREATE TABLE t{i} (a);" for i in range(3000)), "SELECT * FROM t2999"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "script", "sql"), SCHEMAS, ids=[f"{n}-{k}" for n, (k, _, _) in enumerate(SCHEMAS)]
)
def test_hostile_schema(attack, tmp_path: Path, kinds: str, script: str, sql: str) -> None:
    attack(build(tmp_path / "x.sqlite", script), sql, kinds)


BASE = "CREATE TABLE t (a); INSERT INTO t VALUES (1); CREATE TABLE u (a); CREATE INDEX i ON t (a);"
BYTES = "CAST(x'fffe' AS TEXT)"
FORGED = [
    "UPDATE sqlite_master SET sql = 'CREATE TABLE t (' WHERE name = 't'",
    "UPDATE sqlite_master SET sql = 'DROP TABLE t'",
    "UPDATE sqlite_master SET sql = NULL",
    "UPDATE sqlite_master SET sql = hex(zeroblob(400000))",
    "UPDATE sqlite_master SET rootpage = 9999 WHERE name = 't'",
    "UPDATE sqlite_master SET rootpage = 1 WHERE name = 't'",
    "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'u') WHERE name = 'i'",
    "UPDATE sqlite_master SET name = x'fffe', tbl_name = x'fffe' WHERE name = 't'",
    f"UPDATE sqlite_master SET name = {BYTES}, tbl_name = {BYTES},"
    f" sql = 'CREATE TABLE ' || {BYTES} || '(a, ' || {BYTES} || ')' WHERE name = 'u'",
    f"INSERT INTO sqlite_master VALUES ('view', 'w', 'w', 0, 'CREATE VIEW w AS SELECT a AS ' || {BYTES} || ' FROM t')",
    "UPDATE sqlite_master SET type = 'view', sql = 'CREATE VIEW t AS SELECT 1', rootpage = 0 WHERE name = 't'",
    "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 3, 'CREATE TABLE x (a, a)')",
    "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 0, 'CREATE VIRTUAL TABLE x USING dbstat')",
    "INSERT INTO sqlite_master VALUES ('trigger', 'g', 't', 0, 'CREATE TRIGGER g DELETE ON t BEGIN SELECT 1; END')",
    "UPDATE sqlite_master SET sql = 'CREATE TABLE t (a DEFAULT (load_extension(1)))' WHERE name = 't'",
    "DELETE FROM sqlite_master",
]  # fmt: skip


@pytest.mark.parametrize("forgery", FORGED, ids=range(len(FORGED)))
def test_forged_schema(attack, tmp_path: Path, forgery: str) -> None:
    path = build(tmp_path / "x.sqlite", BASE, forgery)
    for sql in (
        "SELECT * FROM t",
        "SELECT * FROM sqlite_master",
        "SELECT * FROM w",
        "SELECT * FROM u, t",
        "SELECT 1",
    ):
        found = attack(path, sql, "rows|database|sql|denied")
        assert found.status != "rows" or sql != "SELECT * FROM t" or found.rows == ((1,),)
    attack(path, "DROP TABLE t", "denied|database|sql")
