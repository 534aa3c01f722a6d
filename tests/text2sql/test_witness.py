"""Witness databases: they tell the gold from its near misses, keep the schema's word, and are the same every time."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.data.item import Item
from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.schema.ddl import read_schema
from quantlab.text2sql.scoring.execution import judge
from quantlab.text2sql.testdata.mutants import mutants
from quantlab.text2sql.testdata.witness import Witness, build

DDL = """
CREATE TABLE teams (team_id INTEGER PRIMARY KEY, name VARCHAR(30) NOT NULL UNIQUE, city VARCHAR(20));
CREATE TABLE players (player_id INTEGER PRIMARY KEY, name VARCHAR(30) NOT NULL, score DECIMAL(5,2),
  level INTEGER NOT NULL CHECK (level BETWEEN 1 AND 60), rank VARCHAR(10) CHECK (rank IN ('gold', 'silver', 'bronze')),
  joined_on DATE NOT NULL, is_banned BOOLEAN NOT NULL, team_id INTEGER,
  FOREIGN KEY (team_id) REFERENCES teams(team_id));
CREATE TABLE games (player_id INTEGER NOT NULL, round INTEGER NOT NULL, points INTEGER, PRIMARY KEY (player_id, round),
  FOREIGN KEY (player_id) REFERENCES players(player_id));
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=2.0, steps=5_000_000), workers=1) as sandbox:
        yield sandbox


def witness(sandbox: Sandbox, folder: Path, sql: str, ddl: str = DDL, seed: int = 0) -> Witness:
    return build(read_schema(ddl), [sql], sandbox, folder, seed=seed)


@pytest.mark.parametrize(
    ("gold", "near_miss"),
    [
        ("SELECT name FROM players WHERE level > 30", "SELECT name FROM players WHERE level >= 30"),
        ("SELECT name FROM players WHERE level > 30", "SELECT name FROM players WHERE level > 29"),
        (
            "SELECT name FROM players WHERE rank = 'gold' AND level < 10",
            "SELECT name FROM players WHERE rank = 'gold'",
        ),
        ("SELECT name FROM players WHERE name LIKE '김%'", "SELECT name FROM players WHERE name LIKE '%김%'"),
        (
            "SELECT name FROM players WHERE name LIKE '%a%b%'",
            "SELECT name FROM players WHERE name LIKE '%a%'",
        ),
        (
            "SELECT name FROM players WHERE team_id IS NULL",
            "SELECT name FROM players WHERE team_id IS NOT NULL",
        ),
        ("SELECT COUNT(*) FROM players", "SELECT COUNT(score) FROM players"),
        ("SELECT COUNT(DISTINCT rank) FROM players", "SELECT COUNT(rank) FROM players"),
        ("SELECT AVG(score) FROM players", "SELECT SUM(score) / COUNT(*) FROM players"),
        (
            "SELECT t.name, COUNT(*) FROM teams t JOIN players p ON p.team_id = t.team_id GROUP BY t.name",
            "SELECT t.name, COUNT(*) FROM teams t LEFT JOIN players p ON p.team_id = t.team_id GROUP BY t.name",
        ),
        (
            "SELECT t.name FROM teams t JOIN players p ON p.team_id = t.team_id GROUP BY t.name HAVING COUNT(*) >= 3",
            "SELECT t.name FROM teams t JOIN players p ON p.team_id = t.team_id GROUP BY t.name HAVING COUNT(*) > 3",
        ),
        (
            "SELECT name FROM players WHERE score > (SELECT AVG(score) FROM players)",
            "SELECT name FROM players WHERE score >= (SELECT AVG(score) FROM players)",
        ),
        (
            "SELECT name FROM players ORDER BY score DESC LIMIT 3",
            "SELECT name FROM players ORDER BY score DESC LIMIT 4",
        ),
        (
            "SELECT name FROM players ORDER BY score DESC LIMIT 1",
            "SELECT name FROM players ORDER BY level DESC LIMIT 1",
        ),
        (
            "SELECT name FROM players WHERE strftime('%Y', joined_on) = '2023'",
            "SELECT name FROM players WHERE joined_on >= '2023-01-01'",
        ),
        (
            "SELECT name FROM players WHERE joined_on BETWEEN '2023-01-01' AND '2023-06-30'",
            "SELECT name FROM players WHERE joined_on >= '2023-01-01' AND joined_on < '2023-06-30'",
        ),
        (
            "SELECT city FROM teams UNION SELECT name FROM players",
            "SELECT city FROM teams UNION ALL SELECT name FROM players",
        ),
        (
            "SELECT name FROM teams WHERE team_id NOT IN (SELECT team_id FROM players WHERE team_id IS NOT NULL)",
            "SELECT name FROM teams WHERE team_id NOT IN (SELECT team_id FROM players)",
        ),
        (
            "SELECT p.name FROM players p JOIN games g ON g.player_id = p.player_id WHERE g.points > 100",
            "SELECT DISTINCT p.name FROM players p JOIN games g ON g.player_id = p.player_id WHERE g.points > 100",
        ),
        (
            "SELECT p.name FROM players p WHERE EXISTS (SELECT 1 FROM games g WHERE g.player_id = p.player_id "
            "AND g.round = 2)",
            "SELECT p.name FROM players p WHERE EXISTS (SELECT 1 FROM games g WHERE g.round = 2)",
        ),
        (
            "SELECT rank, MAX(score) FROM players GROUP BY rank",
            "SELECT rank, MAX(score) FROM players WHERE rank <> '' GROUP BY rank",
        ),
    ],
)
def test_a_near_miss_is_found_out(sandbox: Sandbox, tmp_path: Path, gold: str, near_miss: str) -> None:
    found = witness(sandbox, tmp_path, gold)
    assert judge(sandbox, found.databases, [gold], gold).verdict == "ok"
    verdict = judge(sandbox, found.databases, [gold], near_miss)
    assert verdict.verdict == "wrong" and verdict.evidence, (verdict, found)


@pytest.mark.parametrize(
    ("gold", "other"),
    [
        (
            "SELECT name FROM players WHERE level BETWEEN 10 AND 20",
            "SELECT name FROM players WHERE level >= 10 AND level <= 20",
        ),
        ("SELECT COUNT(*) FROM players", "SELECT COUNT(player_id) FROM players"),
        (
            "SELECT name FROM players WHERE rank IN ('gold', 'silver')",
            "SELECT name FROM players WHERE rank = 'silver' OR rank = 'gold'",
        ),
        (
            "SELECT p.name FROM players p JOIN teams t ON p.team_id = t.team_id WHERE t.city = '서울'",
            "SELECT name FROM players WHERE team_id IN (SELECT team_id FROM teams WHERE city = '서울')",
        ),
        (
            "SELECT name FROM teams WHERE NOT EXISTS (SELECT 1 FROM players p WHERE p.team_id = teams.team_id)",
            "SELECT t.name FROM teams t LEFT JOIN players p ON p.team_id = t.team_id WHERE p.player_id IS NULL",
        ),
        (
            "SELECT name FROM players ORDER BY score DESC LIMIT 2",
            "SELECT name FROM (SELECT name, score FROM players ORDER BY score DESC) LIMIT 2",
        ),
        ("SELECT name, level FROM players", "SELECT level AS l, name AS n FROM players AS x"),
    ],
)
def test_the_same_query_in_other_words_is_right(
    sandbox: Sandbox, tmp_path: Path, gold: str, other: str
) -> None:
    found = witness(sandbox, tmp_path, gold)
    assert judge(sandbox, found.databases, [gold], other).verdict == "ok"


def test_bundled_questions_keep_their_mutation_score(sandbox: Sandbox, tmp_path: Path) -> None:
    killed = total = 0
    for item in load_items("ko_text2sql:dev", 50) + load_items("ko_text2sql:test", 40):
        found = build(read_schema(item.context), item.golds, sandbox, tmp_path)
        assert found.databases, (item.id, found.reason)
        assert found.mutants == found.killed + len(found.survivors)
        killed, total = killed + found.killed, total + found.mutants
    assert total > 700 and killed / total >= 0.95


def test_survivors_are_real(sandbox: Sandbox, tmp_path: Path) -> None:
    """What is counted as killed is killed on the files, and what survives is not."""
    for item in load_items("ko_text2sql:test", 25):
        schema = read_schema(item.context)
        found = build(schema, item.golds, sandbox, tmp_path)
        alive = set(found.survivors)
        for mutant in mutants(item.answer, schema):
            verdict = judge(sandbox, found.databases, item.golds, mutant.sql)
            if verdict.kind != "sql":
                assert (verdict.verdict == "ok") == (mutant in alive), (item.answer, mutant, verdict)


def test_the_schema_is_kept(sandbox: Sandbox, tmp_path: Path) -> None:
    gold = (
        "SELECT p.rank, COUNT(*) FROM players p JOIN games g ON g.player_id = p.player_id "
        "GROUP BY p.rank HAVING COUNT(*) > 2"
    )
    for path in witness(sandbox, tmp_path, gold).databases:
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            levels = {row[0] for row in connection.execute("SELECT level FROM players")}
            ranks = {row[0] for row in connection.execute("SELECT rank FROM players")}
            games = connection.execute(
                "SELECT COUNT(*), COUNT(DISTINCT player_id || ' ' || round) FROM games"
            ).fetchone()
        connection.close()
        assert all(1 <= level <= 60 for level in levels)
        assert ranks <= {"gold", "silver", "bronze", None}
        assert games[0] == games[1]


def test_the_same_rows_every_time_and_others_with_another_seed(sandbox: Sandbox, tmp_path: Path) -> None:
    gold = "SELECT name FROM players WHERE level > 30 AND rank = 'gold'"

    def content(folder: str, seed: int) -> list[str]:
        found = witness(sandbox, tmp_path / folder, gold, seed=seed)
        dumps = []
        for path in found.databases:
            connection = sqlite3.connect(path)
            dumps.append("\n".join(connection.iterdump()))
            connection.close()
        return dumps

    assert content("a", 0) == content("b", 0)
    assert content("a", 0) != content("c", 1)


def test_what_was_made_is_found_again(sandbox: Sandbox, tmp_path: Path) -> None:
    gold = "SELECT name FROM players WHERE level > 30"
    first = witness(sandbox, tmp_path, gold)
    before = {path: path.stat().st_mtime_ns for path in first.databases}
    again = witness(sandbox, tmp_path, gold)
    assert again == first and {path: path.stat().st_mtime_ns for path in again.databases} == before
    first.databases[0].unlink()  # half a cache is no cache
    assert witness(sandbox, tmp_path, gold).databases == first.databases and first.databases[0].is_file()
    record = first.databases[0].parent / "witness.json"
    record.write_text("{", encoding="utf-8")
    assert witness(sandbox, tmp_path, gold) == first


def test_two_at_once_make_one(tmp_path: Path) -> None:
    gold = "SELECT name FROM players WHERE level > 30"
    results: list[Witness] = []

    def make() -> None:
        with Sandbox(workers=1) as own:
            results.append(witness(own, tmp_path, gold))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ("SELECT name FROM players WHERE level > 30 AND level < 20", "returns any"),
        ("SELECT name FROM nowhere", "no table of the DDL"),
        ("DELETE FROM players", "cannot be read"),
        ("SELECT nosuch FROM players", "no such column"),
        ("SELECT 1", "reads no table"),
    ],
)
def test_where_none_can_be_made_the_reason_is_told(
    sandbox: Sandbox, tmp_path: Path, gold: str, words: str
) -> None:
    found = witness(sandbox, tmp_path, gold)
    assert found.databases == () and words in found.reason
    assert list(tmp_path.iterdir()) == []


def test_hostile_golds_stay_in_the_sandbox(sandbox: Sandbox, tmp_path: Path) -> None:
    for gold in (
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT name FROM players, r",
        "SELECT name, load_extension('x') FROM players",
        "SELECT writefile('/tmp/x', name) FROM players",
        "SELECT name FROM players, pragma_table_info('players')",
        "SELECT hex(zeroblob(900000000)) FROM players",
    ):
        assert witness(sandbox, tmp_path, gold).databases == ()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40)
@given(st.text(max_size=200))
def test_no_text_makes_it_raise(sandbox: Sandbox, text: str) -> None:
    build(read_schema(DDL), [text], sandbox, Path("/nonexistent"))


def test_checks_that_no_drawn_row_meets_are_given_up(sandbox: Sandbox, tmp_path: Path) -> None:
    ddl = (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, code TEXT NOT NULL CHECK (length(code) = 9 AND code LIKE 'ab-%'), "
        "a INTEGER CHECK (a BETWEEN 1 AND 9), b INTEGER, CHECK (b * b = a + 12345));"
    )
    found = witness(sandbox, tmp_path, "SELECT id FROM t WHERE a > 4", ddl)
    assert found.databases and found.score == 1.0
    with sqlite3.connect(found.databases[0]) as connection:
        assert {a for (a,) in connection.execute("SELECT a FROM t")} <= {None, *range(1, 10)}
    connection.close()


def test_an_item_without_keys_in_its_ddl(sandbox: Sandbox, tmp_path: Path) -> None:
    ddl = "CREATE TABLE author (aid INTEGER, name TEXT); CREATE TABLE writes (aid INTEGER, pid INTEGER);"
    gold = "SELECT a.name FROM author a JOIN writes w ON a.aid = w.aid GROUP BY a.name HAVING COUNT(*) > 2"
    found = witness(sandbox, tmp_path, gold, ddl)
    assert found.score is not None and found.score >= 0.9
    item = Item("1", "x", ddl, "q", gold)
    assert item.database is None
