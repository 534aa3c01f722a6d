"""Hostile SQL against the sandbox: the file is unchanged, the run goes on, each is reported as what it is."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab.sql.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=1.0, grace=0.5, steps=20_000_000, rows=10_000, memory_bytes=64 * 2**20)

ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
BIG = "WITH RECURSIVE r(x, y) AS (SELECT 1, randomblob(900000) UNION ALL SELECT x + 1, randomblob(900000) FROM r)"

ATTACKS: list[tuple[str, str, str]] = [
    # Writing
    ("DELETE FROM players", "error", "denied"),
    ("UPDATE players SET level = 0", "error", "denied"),
    ("INSERT INTO players (name, level) VALUES ('x', 1)", "error", "denied"),
    ("REPLACE INTO players (player_id, name, level) VALUES (1, 'x', 1)", "error", "denied"),
    ("INSERT INTO players (name, level) SELECT name, 1 FROM players RETURNING name", "error", "denied"),
    ("WITH c AS (SELECT 1) DELETE FROM players", "error", "denied"),
    ("DROP TABLE players", "error", "denied"),
    ("ALTER TABLE players RENAME TO gone", "error", "denied"),
    ("CREATE TABLE x (a)", "error", "denied"),
    ("CREATE TEMP TABLE x AS SELECT 1", "error", "denied"),
    ("CREATE INDEX i ON players (name)", "error", "denied"),
    ("CREATE VIEW v AS SELECT 1", "error", "denied"),
    ("CREATE TRIGGER g AFTER INSERT ON players BEGIN DELETE FROM players; END", "error", "denied"),
    ("REINDEX", "error", "denied"),
    ("ANALYZE", "error", "denied"),
    # Reaching out of the file
    ("ATTACH DATABASE '{other}' AS o", "error", "denied"),
    ("ATTACH ':memory:' AS o", "error", "denied"),
    ("DETACH main", "error", "denied"),
    ("VACUUM", "error", "denied"),
    ("VACUUM INTO '{other}'", "error", "denied"),
    ("SELECT load_extension('{other}')", "error", "denied"),
    ("SELECT writefile('{other}', 'x')", "error", "sql"),
    ("SELECT readfile('/etc/passwd')", "error", "sql"),
    ("SELECT fts3_tokenizer('simple', x'00')", "error", "denied"),
    ("CREATE VIRTUAL TABLE v USING fts5(a)", "error", "denied"),
    ("CREATE VIRTUAL TABLE v USING csv(filename='/etc/passwd')", "error", "denied"),
    # Looking at or changing the engine
    ("PRAGMA writable_schema = 1", "error", "denied"),
    ("PRAGMA query_only = 0", "error", "denied"),
    ("PRAGMA case_sensitive_like = 1", "error", "denied"),
    ("SELECT * FROM pragma_table_info('players')", "error", "denied"),
    ("SELECT COUNT(*) FROM pragma_database_list", "error", "denied"),
    ("SELECT * FROM dbstat", "error", "denied"),
    ("SELECT * FROM sqlite_stmt", "error", "denied"),
    ("EXPLAIN SELECT 1", "error", "denied"),
    ("/* x */ -- y\n EXPLAIN QUERY PLAN SELECT 1", "error", "denied"),
    # Transactions
    ("BEGIN EXCLUSIVE", "error", "denied"),
    ("COMMIT", "error", "denied"),
    ("ROLLBACK", "error", "denied"),
    ("SAVEPOINT s", "error", "denied"),
    # Several statements, none, and bytes that are no SQL
    ("SELECT 1; DROP TABLE players", "error", "several"),
    ("SELECT 1;;; SELECT 2", "error", "several"),
    ("", "error", "empty"),
    (";", "error", "empty"),
    ("-- nothing", "error", "empty"),
    ("SELECT 1\x00; DROP TABLE players", "error", "sql"),
    ("\udcff\udcfe", "error", "sql"),
    ("SELECT ?", "error", "sql"),
    ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "error", "sql"),
    ("SELECT " + " + ".join(["1"] * 5000), "error", "sql"),
    (" UNION ALL ".join(["SELECT 1"] * 600), "error", "sql"),
    ("SELECT '" + "a" * 2_000_000 + "'", "error", "size"),
    # Without end
    (f"{ENDLESS} SELECT COUNT(*) FROM r", "timeout", "steps"),
    (f"{ENDLESS} SELECT x FROM r", "error", "too_many_rows"),
    ("SELECT COUNT(*) FROM " + ", ".join(f"players p{i}" for i in range(20)), "timeout", "steps"),
    ("SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')", "timeout", "seconds"),
    # Without measure
    ("SELECT randomblob(1000000000)", "error", "size"),
    ("SELECT zeroblob(2147483647)", "error", "size"),
    ("SELECT hex(printf('%900000d', 1))", "error", "size"),
    ("SELECT replace(hex(zeroblob(400000)), '0', 'aaaaaaaaaa')", "error", "size"),
    ("SELECT group_concat(hex(randomblob(400000))) FROM players WHERE level < 5", "error", "size"),
    (f"{BIG} SELECT COUNT(*) FROM (SELECT * FROM r ORDER BY y)", "error", "memory"),
    (f"{BIG} SELECT y FROM r LIMIT 5000", "error", "size"),
    ("SELECT COUNT(*) FROM players WHERE 'aaaa' LIKE '" + "%a" * 2000 + "'", "error", "sql"),
]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("victim") / "victim.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE players (player_id INTEGER PRIMARY KEY, name TEXT NOT NULL, level INTEGER NOT NULL)"
    )
    connection.executemany(
        "INSERT INTO players (name, level) VALUES (?, ?)", [(f"선수{i}", i) for i in range(50)]
    )
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


def fingerprint(path: Path) -> tuple[str, list[str]]:
    names = sorted(found.name for found in path.parent.iterdir())
    return hashlib.sha256(path.read_bytes()).hexdigest(), names


@pytest.mark.parametrize(("sql", "status", "kind"), ATTACKS, ids=range(len(ATTACKS)))
def test_attack(sandbox: Sandbox, victim: Path, sql: str, status: str, kind: str) -> None:
    before = fingerprint(victim)
    other = victim.parent / "other.sqlite"
    started = time.monotonic()
    found = sandbox.run(victim, sql.replace("{other}", str(other)))
    assert time.monotonic() - started < LIMITS.seconds + LIMITS.grace + 1.0
    assert (found.status, found.kind) == (status, kind), found.reason
    assert found.reason and not found.rows
    assert fingerprint(victim) == before
    alive = sandbox.run(victim, "SELECT COUNT(*) FROM players", role="gold")
    assert alive.rows == ((50,),)


def test_what_is_allowed(sandbox: Sandbox, victim: Path) -> None:
    for sql in (
        "WITH c AS (SELECT level FROM players) SELECT COUNT(*) FROM c",
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r WHERE x < 9) SELECT COUNT(*) FROM r",
        "SELECT COUNT(*) FROM json_each('[1, 2]')",
        "SELECT name, RANK() OVER (ORDER BY level) FROM players",
        "SELECT strftime('%Y', '2024-05-01'), date('now'), sqrt(2), upper('a'), '가' || '나'",
        "VALUES (1), (2)",
        "SELECT COUNT(*) FROM sqlite_master;",
        "SELECT x'00ff', 9e999, NULL;  -- and a comment",
    ):
        found = sandbox.run(victim, sql)
        assert found.status == "rows", (sql, found.reason)
    assert sandbox.run(victim, "SELECT x'00ff', 9e999, NULL").rows == ((b"\x00\xff", float("inf"), None),)


def test_text_that_is_not_utf8_survives_the_pipe(sandbox: Sandbox, victim: Path) -> None:
    found = sandbox.run(victim, "SELECT CAST(x'ff41' AS TEXT)")
    assert found.rows == (("\udcffA",),)


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 500]
)
def test_a_file_that_is_no_database(sandbox: Sandbox, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(content)
    found = sandbox.run(path, "SELECT * FROM players")
    assert found.status == "error"
    assert sandbox.run(tmp_path / "missing.sqlite", "SELECT 1").kind == "database"
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_killed_worker_is_replaced(victim: Path) -> None:
    with Sandbox(LIMITS) as sandbox:
        assert sandbox.run(victim, "SELECT 1").rows == ((1,),)
        process = sandbox._all[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert sandbox.run(victim, "SELECT 2").rows == ((2,),)
        second = sandbox._all[0].process
        assert second is not None and second.pid != process.pid
        killer = threading.Timer(0.2, second.kill)
        killer.start()
        slow = sandbox.run(victim, f"{ENDLESS} SELECT COUNT(*) FROM r")
        assert slow.kind in ("crash", "steps")
        assert sandbox.run(victim, "SELECT 3").rows == ((3,),)


@pytest.mark.skipif(sys.platform == "win32", reason="interval timers")
def test_an_orphan_ends_by_itself(victim: Path) -> None:
    """With the parent's deadline switched off, the worker's own timer still ends a query that hangs in the engine."""
    limits = Limits(seconds=0.2, grace=0.1)
    with Sandbox(limits) as sandbox:
        process = sandbox._all[0]
        started = process._started()
        exchange = process._exchange
        began = time.monotonic()
        answer, late = exchange(started, {"database": str(victim), "sql": ATTACKS_HANG, "role": "gold"}, 30.0)
        assert (answer, late) == (None, False)
        assert time.monotonic() - began < 5.0
        assert started.wait() == -signal.SIGALRM


ATTACKS_HANG = "SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')"


def test_a_hang_does_not_delay_the_other_worker(victim: Path) -> None:
    with Sandbox(LIMITS, workers=2) as sandbox:
        sandbox.run(victim, "SELECT 1")
        began = time.monotonic()
        times: list[float] = []

        def one(sql: str) -> str:
            status = sandbox.run(victim, sql).status
            times.append(time.monotonic() - began)
            return status

        found = list(sandbox.map(one, [ATTACKS_HANG] + [f"SELECT {i}" for i in range(50)]))
    assert found == ["timeout"] + ["rows"] * 50  # in the order of the questions
    assert sorted(times)[49] < LIMITS.seconds


def test_gold_and_prediction_do_not_share_a_connection(victim: Path) -> None:
    """So nothing that one of them left on its connection can reach the other."""
    from quantlab.sql.worker import Worker

    worker = Worker({**LIMITS.__dict__})
    for role in ("gold", "prediction", "gold"):
        assert worker.answer({"database": str(victim), "sql": "SELECT 1", "role": role})["rows"] == [[1]]
    assert len(worker.connections) == 2


def test_the_worker_is_alone(victim: Path) -> None:
    """No torch, no third-party package, no secret of the environment."""
    os.environ["QUANTLAB_TEST_SECRET"] = "s3cret"
    try:
        with Sandbox(LIMITS) as sandbox:
            sandbox.run(victim, "SELECT 1")
            process = sandbox._all[0].process
            assert process is not None
            assert "-I" in process.args and "-S" in process.args  # type: ignore[operator]
            environment = Path(f"/proc/{process.pid}/environ")
            if environment.exists():
                assert b"s3cret" not in environment.read_bytes()
                assert b"torch" not in Path(f"/proc/{process.pid}/maps").read_bytes()
    finally:
        del os.environ["QUANTLAB_TEST_SECRET"]


def test_a_thousand_queries_take_seconds(victim: Path) -> None:
    with Sandbox(LIMITS, workers=2) as sandbox:
        began = time.monotonic()
        found = list(
            sandbox.map(lambda i: sandbox.run(victim, f"SELECT {i}, COUNT(*) FROM players").rows, range(1000))
        )
        assert time.monotonic() - began < 10.0
    assert found == [((i, 50),) for i in range(1000)]


def test_rows_still_in_a_write_ahead_log_are_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "wal.sqlite"
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t (a)")
    writer.execute("INSERT INTO t VALUES (1)")
    writer.commit()
    try:
        assert sandbox.run(path, "SELECT * FROM t").rows == ((1,),)
    finally:
        writer.close()
    assert sandbox.run(path, "SELECT * FROM t").rows == ((1,),)  # and once the log has been written back


def test_a_changed_file_is_opened_anew(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    for value in (1, 2):
        connection = sqlite3.connect(path)
        connection.executescript(
            f"DROP TABLE IF EXISTS t; CREATE TABLE t (a); INSERT INTO t VALUES ({value});"
        )
        connection.close()
        os.utime(path, ns=(value, value))
        assert sandbox.run(path, "SELECT a FROM t").rows == ((value,),)
