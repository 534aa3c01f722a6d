"""Trials: what may build a database and what may not, what one query may do to the next, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantlab.text2sql.sandbox.pool import Execution, Sandbox, Trial

CREATE = """
CREATE TABLE "부 서" (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE CHECK (length(name) < 20));
CREATE TABLE staff (
  id INTEGER PRIMARY KEY, d INTEGER REFERENCES "부 서" (id), pay REAL, twice REAL GENERATED ALWAYS AS (pay * 2)
);
CREATE TABLE pairs (a INTEGER, b TEXT, PRIMARY KEY (a, b), FOREIGN KEY (a) REFERENCES staff (id)) WITHOUT ROWID;
CREATE INDEX by_name ON "부 서" (lower(name));
"""
ROWS: list[tuple[str, list[str], list[list[Any]]]] = [
    ("부 서", ["id", "name"], [[1, "영업"], [2, "개발"]]),
    ("staff", ["id", "d", "pay"], [[1, 1, 10.0], [2, 1, None], [3, None, 2.5]]),
    ("pairs", ["a", "b"], [[1, "x"], [1, "y"]]),
]
PLAIN: list[Any] = [("t", ["a"], [[1], [2.0], ["가"], [b"\x00\xff"], [None]])]
GROWING = "WITH RECURSIVE r(x, y) AS (SELECT 1, hex(zeroblob(450000)) UNION ALL SELECT x + 1, y FROM r)"
HANG = "SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')"
ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT COUNT(*) FROM r"


def kinds(found: list[Execution]) -> list[str]:
    return [one.kind for one in found]


def test_every_query_has_its_answer(sandbox: Sandbox) -> None:
    queries = [
        'SELECT s.id, d.name FROM staff s JOIN "부 서" d ON d.id = s.d',
        'SELECT s.id AS other, d.name FROM staff s JOIN "부 서" d ON d.id = s.d WHERE s.id < 3',
        "SELECT id, NULL FROM staff",
        "SELECT twice FROM staff",
        "SELECT nothing FROM staff",
        "SELECT COUNT(*) FROM pairs",
    ]
    for _ in range(3):  # the tables stay, the rows must not
        found = sandbox.trial(CREATE, ROWS, queries)
        assert kinds(found) == ["rows", "rows", "rows", "rows", "sql", "rows"]
        assert [one.same for one in found] == [False, True, False, False, False, False]
        assert found[0].rows == found[1].rows == ((1, "영업"), (2, "영업"))
        assert found[1].columns == ("other", "name")
        assert found[3].rows == ((20.0,), (None,), (5.0,))
        assert found[5].rows == ((2,),)
    assert sandbox.trial(CREATE, [], ["SELECT COUNT(*) FROM staff"])[0].rows == ((0,),)
    assert sandbox.trial(CREATE, ROWS, []) == sandbox.trials([]) == []


def test_same_means_the_same(sandbox: Sandbox) -> None:
    """In number of columns, in types and in order; and what is left out is filled in again."""
    pairs = [
        ("SELECT 1", "SELECT 1 AS x", True),
        ("SELECT 1", "SELECT 1.0", False),
        ("SELECT 1", "SELECT '1'", False),
        ("SELECT 'a'", "SELECT x'61'", False),
        ("SELECT 1 WHERE 0", "SELECT 2 WHERE 0", True),
        ("SELECT 1 WHERE 0", "SELECT 1, 2 WHERE 0", False),
        ("SELECT a FROM t", "SELECT a FROM t ORDER BY rowid", True),
        ("SELECT a FROM t", "SELECT a FROM t ORDER BY rowid DESC", False),
        ("SELECT a FROM t", "SELECT a FROM t LIMIT 4", False),
        ("SELECT NULL", "SELECT NULL", True),
        ("SELECT 0.0", "SELECT -0.0", False),
    ]
    for first, second, same in pairs:
        found = sandbox.trial("CREATE TABLE t (a)", PLAIN, [first, second, first])
        assert [one.same for one in found] == [False, same, True], (first, second)
        assert not same or found[1].rows == found[0].rows
        assert found[2].rows == found[0].rows
    assert found[0].status == "rows"
    values = sandbox.trial("CREATE TABLE t (a)", PLAIN, ["SELECT a FROM t"])[0].rows
    assert repr(values) == "((1,), (2.0,), ('가',), (b'\\x00\\xff',), (None,))"


@pytest.mark.parametrize(
    ("create", "rows", "words"),
    [
        ("CREATE TABLE t (", [], "incomplete input"),
        ("CREATE TABLE t (a); DROP TABLE t", [], "only CREATE TABLE"),
        ("CREATE TABLE t (a); INSERT INTO t VALUES (1)", [], "only CREATE TABLE"),
        ("CREATE TABLE t AS SELECT 1", [], "only CREATE TABLE"),
        ("CREATE TEMP TABLE t (a)", [], "only CREATE TABLE"),
        ("CREATE VIEW t AS SELECT 1", [], "only CREATE TABLE"),
        ("CREATE TABLE t (a); CREATE TRIGGER g DELETE ON t BEGIN SELECT 1; END", [], "only CREATE TABLE"),
        ("CREATE VIRTUAL TABLE t USING fts5(a)", [], "only CREATE TABLE"),
        ("ATTACH '/tmp/x.sqlite' AS o", [], "only CREATE TABLE"),
        ("PRAGMA hard_heap_limit = 0", [], "only CREATE TABLE"),
        ("BEGIN; CREATE TABLE t (a)", [], "only CREATE TABLE"),
        ("SELECT 1", [], "only CREATE TABLE"),
        ("CREATE TABLE t (a CHECK (load_extension('x')))", PLAIN, "load_extension"),
        ("CREATE TABLE t (a)\x00", [], "null character"),
        ("CREATE TABLE t (a UNIQUE)", [("t", ["a"], [[1], [1]])], "UNIQUE constraint failed: t.a"),
        ("CREATE TABLE t (a NOT NULL)", PLAIN, "NOT NULL constraint failed: t.a"),
        ("CREATE TABLE t (a)", [("u", ["a"], [[1]])], "no such table: u"),
        ("CREATE TABLE t (a)", [("t", ["b"], [[1]])], "has no column named b"),
        ("CREATE TABLE t (a)", [("t", ["a"], [[1, 2]])], "t: Incorrect number of bindings"),
        ("CREATE TABLE t (a)", [("t", ["a"], [[2**70]])], "too large"),
        ("CREATE TABLE t (a)", [("t", ["a"], [["\ud800"]])], "surrogates"),
        ("CREATE TABLE t (a)", [("t", ["a"], [["x" * 2_000_000]])], "too big"),
        ("CREATE TABLE t (a)", [("sqlite_master", ["name"], [["x"]])], "sqlite_master"),
        ('CREATE TABLE t (a)', [('t" (a) VALUES (1); DROP TABLE "t', ["a"], [[1]])], "no such table"),
        ("CREATE TABLE t (a)", [("t", ['a") VALUES (1) --'], [[1]])], "has no column named"),
        (CREATE, [("staff", ["id", "d"], [[1, 7], [2, 8]])], "foreign key of staff: 2 rows, no such row in 부 서"),
        (CREATE, [("pairs", ["a", "b"], [[9, "x"]])], "foreign key of pairs"),
        ("CREATE TABLE p (a); CREATE TABLE c (a REFERENCES p (a))", [("c", ["a"], [[1]])], "mismatch"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_built(sandbox: Sandbox, create: str, rows: Any, words: str) -> None:
    found = sandbox.trial(create, rows, ["SELECT 1", "SELECT 2"])
    assert [(one.status, one.kind) for one in found] == [("error", "database")] * 2
    assert words in found[0].reason
    assert sandbox.trial(CREATE, ROWS, ["SELECT COUNT(*) FROM staff"])[0].rows == ((3,),)


def test_a_value_that_cannot_be_sent_is_the_callers_mistake(sandbox: Sandbox) -> None:
    with pytest.raises(TypeError, match="type set cannot be sent"):
        sandbox.trial("CREATE TABLE t (a)", [("t", ["a"], [[{1}]])], ["SELECT 1"])
    assert sandbox.trial(CREATE, ROWS, ["SELECT 1"])[0].rows == ((1,),)


HOSTILE = [
    ("denied", "DELETE FROM staff"),
    ("denied", "INSERT INTO staff (id) VALUES (77)"),
    ("denied", "DROP TABLE staff"),
    ("denied", "CREATE TABLE x (a)"),
    ("denied", "COMMIT"),
    ("denied", "ROLLBACK"),
    ("denied", "BEGIN"),
    ("denied", "PRAGMA query_only = 0"),
    ("denied", "PRAGMA foreign_key_check"),
    ("denied", "ATTACH '/tmp/x.sqlite' AS o"),
    ("denied", "SELECT * FROM pragma_table_info('staff')"),
    ("denied", "SELECT load_extension('x')"),
    ("denied", "EXPLAIN SELECT 1"),
    ("denied", 'INSERT INTO "staff" ("id", "d", "pay") VALUES (?, ?, ?)'),
    ("several", "SELECT 1; COMMIT"),
    ("size", "SELECT zeroblob(2000000)"),
    ("size", "SELECT '" + "a" * 2_000_000 + "'"),
    ("steps", ENDLESS),
    ("too_many_rows", ENDLESS.replace("COUNT(*)", "x")),
    ("memory", f"{GROWING} SELECT COUNT(*) FROM (SELECT * FROM r ORDER BY y)"),
    ("empty", ""),
    ("sql", "SELECT 1\x00"),
]  # fmt: skip


def test_no_query_harms_the_next(sandbox: Sandbox) -> None:
    """Not even one that makes SQLite roll the rows back, or repeats a statement that is prepared for ourselves."""
    count = 'SELECT COUNT(*), (SELECT COUNT(*) FROM "부 서") FROM staff'
    for _ in range(2):
        for kind, sql in HOSTILE:
            found = sandbox.trial(CREATE, ROWS, [count, sql, count, sql, count])
            assert found[1].kind == kind, (sql[:80], found[1].reason)
            assert found[3].kind in (kind, "seconds")
            for one in found[::2]:  # unless the two have taken the time of all
                assert one.rows == ((3, 2),) or one.kind == "seconds"
            assert found[2].rows == ((3, 2),)


def test_time_is_for_all_of_them(sandbox: Sandbox) -> None:
    slow = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 2000) SELECT " + (
        "SUM(length(replace(hex(zeroblob(20000)), '00', 'b' || x))) FROM r"
    )
    found = sandbox.trial(CREATE, ROWS, ["SELECT 1", *[slow] * 20, "SELECT 1"])
    assert found[0].rows == ((1,),)
    assert "seconds" in kinds(found)
    assert set(kinds(found)) <= {"rows", "seconds"}


def test_bytes_are_for_all_of_them(sandbox: Sandbox) -> None:
    """The limit is that of one answer, so that many cannot flood the pipe; what is left out costs nothing."""
    wide = [f"SELECT zeroblob(700000 + {number})" for number in range(5)]
    assert kinds(sandbox.trial("CREATE TABLE t (a)", [], wide)) == ["rows", "rows", "size", "size", "size"]
    assert kinds(sandbox.trial("CREATE TABLE t (a)", [], wide[:1] * 20)) == ["rows"] * 20


def test_a_hang_is_the_end_of_the_whole_trial_only(sandbox: Sandbox, victim: Path) -> None:
    found = sandbox.trials([Trial(CREATE, ROWS, ["SELECT 1", HANG]), Trial(CREATE, ROWS, ["SELECT 2"])])
    assert [kinds(one) for one in found] == [["seconds"] * 2, ["seconds"]]
    assert sandbox.trial(CREATE, ROWS, ["SELECT COUNT(*) FROM staff"])[0].rows == ((3,),)
    assert sandbox.run(victim, "SELECT COUNT(*) FROM players").rows == ((50,),)


def test_trials_do_not_see_each_other(sandbox: Sandbox) -> None:
    trials = [
        Trial(
            "CREATE TABLE t (a)" + " " * (n % 7),
            [("t", ["a"], [[n]] * (n % 3))],
            ["SELECT a FROM t", "SELECT 1"],
        )
        for n in range(50)
    ]
    for n, found in enumerate(sandbox.trials(trials)):
        assert found[0].rows == ((n,),) * (n % 3)
        assert found[1].rows == ((1,),)
