"""Names in queries against DDL, with SQLite itself as the oracle."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter

import pytest
from sqlglot import exp

from quantlab.text2sql.data.dataset import load_items
from quantlab.text2sql.schema.name_check import known_names, unknown_name
from quantlab.text2sql.scoring.exact_match import parse

DDL = """
CREATE TABLE teams (team_id INTEGER PRIMARY KEY, name TEXT NOT NULL, "founded on" DATE);
CREATE TABLE players (player_id INTEGER PRIMARY KEY, name TEXT, score REAL, team_id INTEGER REFERENCES teams(team_id));
CREATE TABLE matches (match_id INTEGER PRIMARY KEY, home_id INTEGER, away_id INTEGER, played_on DATE, info TEXT);
"""

GOOD = [
    "SELECT * FROM players",
    "SELECT NAME, Players.Score FROM PLAYERS",
    "SELECT p.*, t.name AS team FROM players p JOIN teams AS t USING (team_id) WHERE team_id = 1",
    "SELECT team_id FROM players NATURAL JOIN (SELECT team_id FROM teams)",
    "SELECT t.name FROM teams t WHERE EXISTS (SELECT 1 FROM players WHERE team_id = t.team_id AND score > 3)",
    "SELECT name, (SELECT COUNT(*) FROM players p WHERE p.team_id = teams.team_id) AS n FROM teams ORDER BY n DESC",
    "SELECT score * 2 AS doubled FROM players WHERE doubled > 3 GROUP BY doubled HAVING doubled > 1",
    "WITH b AS (SELECT team_id, MAX(score) AS top FROM players GROUP BY 1) SELECT top FROM b JOIN teams USING(team_id)",
    "WITH b(x, y) AS (SELECT name, score FROM players) SELECT x FROM b WHERE y > (SELECT AVG(y) FROM b)",
    "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 5) SELECT n FROM c",
    "WITH a AS (SELECT name FROM players), b AS (SELECT name FROM a) SELECT * FROM b AS b1 JOIN b AS b2 USING (name)",
    "SELECT name FROM players UNION SELECT name FROM teams ORDER BY name",
    "SELECT name FROM (SELECT name, score FROM players WHERE score > 1) WHERE score < 9",
    "SELECT s.total FROM (SELECT team_id, SUM(score) total FROM players GROUP BY team_id) AS s",
    "SELECT a.name, b.name FROM players a, players b WHERE a.team_id = b.team_id AND a.player_id < b.player_id",
    "SELECT rowid, oid FROM players",
    'SELECT "founded on", [name], `team_id` FROM teams',
    "SELECT COUNT(DISTINCT team_id), COUNT(*) FROM players WHERE name LIKE '김%'",
    "SELECT name FROM players WHERE team_id IN (SELECT team_id FROM teams) ORDER BY score DESC LIMIT 3",
    "SELECT CASE WHEN score > 3 THEN 'a' ELSE name END AS c FROM players ORDER BY c",
    "SELECT strftime('%Y', played_on) AS y, COUNT(*) FROM matches GROUP BY y HAVING COUNT(*) > 1 ORDER BY 2",
    "SELECT RANK() OVER (PARTITION BY team_id ORDER BY score DESC) AS r, name FROM players",
    "SELECT SUM(score) OVER w FROM players WINDOW w AS (PARTITION BY team_id)",
    "SELECT h.name FROM (matches m JOIN teams h ON m.home_id = h.team_id) JOIN teams a ON m.away_id = a.team_id",
    "SELECT j.value FROM matches, json_each(matches.info) AS j WHERE j.key = 'x'",
    'SELECT name FROM players WHERE name = "김가람" OR name IN ("a", "b")',
    "SELECT CAST(score AS INTEGER), CURRENT_DATE, date('now', '-1 day') FROM players",
    "SELECT p.name AS name FROM players p JOIN teams t ON p.team_id = t.team_id ORDER BY name",
    "SELECT 1",
    "SELECT main.players.name FROM players",
    "SELECT x.column1 FROM (VALUES (1, 2), (3, 4)) AS x",
    "SELECT name FROM players EXCEPT SELECT name FROM (SELECT name FROM teams UNION ALL SELECT name FROM players)",
]
BAD = [
    ("SELECT nmae FROM players", "no column nmae; did you mean name?"),
    ("SELECT p.socre FROM players AS p", "no column socre in players AS p; did you mean score?"),
    ("SELECT played_on FROM players", "no column played_on; matches has it"),
    ("SELECT players.played_on FROM players", "no column played_on in players; matches has it"),
    ("SELECT name FROM player", "no table player; did you mean players?"),
    ("SELECT name FROM orders", "no table orders; there are teams, players, matches"),
    ("SELECT name FROM players p JOIN teams t ON p.team_id = t.team_id", "column name is ambiguous: players and teams"),
    ("SELECT players.name FROM players AS p", "no table players here: it is called p"),
    ("SELECT q.name FROM players AS p", "no table or alias q here"),
    ("SELECT q.* FROM players AS p", "no table or alias q here"),
    ("SELECT name FROM players JOIN matches USING (team_id)", "no column team_id in matches"),
    ("SELECT name FROM teams WHERE EXISTS (SELECT 1 FROM players WHERE team_id = teams.points)", "points in teams"),
    ("SELECT score FROM (SELECT name FROM players)", "no column score"),
    ("SELECT s.score FROM (SELECT name FROM players) AS s", "no column score"),
    ("WITH b(x) AS (SELECT name FROM players) SELECT name FROM b", "no column name"),
    ("SELECT name FROM players UNION SELECT name FROM teams ORDER BY score", "no result column score"),
    ("SELECT t.name FROM teams t, (SELECT name FROM players WHERE team_id = t.team_id) x", "no table or alias t"),
    ("SELECT name FROM players WHERE team_id IN (SELECT team FROM teams)", "no column team; did you mean"),
    ("SELECT COUNT(*) FROM players GROUP BY team", "no column team"),
]  # fmt: skip


def sqlite_error(ddl: str, sql: str) -> str | None:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(ddl)
        connection.execute(f"EXPLAIN {sql}")
    except sqlite3.Error as error:
        return str(error)
    finally:
        connection.close()
    return None


def mine(ddl: str, sql: str) -> str | None:
    schema, tree = known_names(ddl), parse(sql)
    assert schema is not None and tree is not None
    return unknown_name(tree, schema)


@pytest.mark.parametrize("sql", GOOD)
def test_what_sqlite_accepts_binds(sql: str) -> None:
    assert sqlite_error(DDL, sql) is None
    assert mine(DDL, sql) is None


@pytest.mark.parametrize(("sql", "words"), BAD)
def test_what_is_wrong_is_named(sql: str, words: str) -> None:
    assert sqlite_error(DDL, sql) is not None
    assert words in (mine(DDL, sql) or "")


@pytest.mark.parametrize("sql", ['SELECT "nmae" FROM players', 'SELECT name FROM players ORDER BY "scoer"'])
def test_a_misspelt_name_in_double_quotes_is_no_string(sql: str) -> None:
    """SQLite runs both as constants, which is never what was meant."""
    assert sqlite_error(DDL, sql) is None
    assert "did you mean" in (mine(DDL, sql) or "")


def test_misspelt_names_in_bundled_queries() -> None:
    """Every query binds as it is; with one identifier exchanged it binds exactly where SQLite prepares it."""
    seeded = random.Random(0)
    agree: Counter[bool] = Counter()
    for item in load_items("ko_text2sql:dev", 90) + load_items("ko_text2sql:test"):
        tree = parse(item.answer)
        assert tree is not None and mine(item.context, item.answer) is None
        schema = known_names(item.context)
        assert schema is not None
        names = sorted({column for _, columns in schema.tables.values() for column in columns or {}})
        names += [*schema.tables, *(node.name for node in tree.find_all(exp.Identifier))]
        seeded.choice(list(tree.find_all(exp.Identifier))).set("this", seeded.choice(names))
        sql = tree.sql(dialect="sqlite")
        error = sqlite_error(item.context, sql)
        if error is None or "no such" in error or "ambiguous" in error:
            agree[(error is None) == (mine(item.context, sql) is None)] += 1
    assert agree[True] > 180 and agree[False] <= 1


def test_other_dialects_views_and_alterations() -> None:
    mysql = (
        "CREATE TABLE `users` (`id` INT NOT NULL AUTO_INCREMENT, `tier` ENUM('a','b') COMMENT '등급', "
        "PRIMARY KEY (`id`)) ENGINE=InnoDB;"
    )
    assert mine(mysql, "SELECT tier FROM users WHERE id = 1") is None
    assert "did you mean tier" in (mine(mysql, "SELECT teir FROM users") or "")
    view = DDL + "CREATE VIEW v AS SELECT * FROM players;"
    assert mine(view, "SELECT whatever FROM v") is None
    assert mine(DDL + "ALTER TABLE teams ADD COLUMN city TEXT;", "SELECT city FROM teams") is None


@pytest.mark.parametrize("ddl", ["", "이것은 DDL이 아닙니다", "CREATE TABLE (", "(" * 5000, "SELECT 1"])
def test_unreadable_ddl(ddl: str) -> None:
    assert known_names(ddl) is None
