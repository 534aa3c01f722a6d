"""Where questions run: their own database, witness databases, other dialects, the fixed clock; and why not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab.text2sql.data.item import Item
from quantlab.text2sql.dialects.transpile import CLOCK
from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.scoring.databases import Setting, find_ground, judge_on

MYSQL = """
CREATE TABLE `users` (`id` INT UNSIGNED AUTO_INCREMENT PRIMARY KEY, `name` VARCHAR(30) NOT NULL,
  `grade` ENUM('gold', 'silver') NOT NULL, `joined` DATETIME NOT NULL) ENGINE=InnoDB;
"""
POSTGRES = """
CREATE TABLE users (id SERIAL PRIMARY KEY, name VARCHAR(30) NOT NULL, joined TIMESTAMP WITH TIME ZONE NOT NULL,
  active BOOLEAN NOT NULL DEFAULT TRUE, spent NUMERIC(10,2));
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def item(context: str, gold: str, database: Path | None = None, dialect: str = "", *more: str) -> Item:
    return Item("1", "1", context, "?", gold, database, more, {}, dialect)


@pytest.mark.parametrize(
    ("ddl", "gold", "right", "wrong"),
    [
        (
            MYSQL,
            "SELECT CONCAT(name, '!') FROM users WHERE grade = 'gold'",
            "SELECT CONCAT(`name`, '!') FROM `users` WHERE `grade` = \"gold\"",
            "SELECT CONCAT(name, '?') FROM users WHERE grade = 'gold'",
        ),
        (
            MYSQL,
            "SELECT name FROM users WHERE YEAR(joined) = 2023 LIMIT 0, 100",
            "SELECT name FROM users WHERE joined >= '2023-01-01' AND joined < '2024-01-01'",
            "SELECT name FROM users WHERE MONTH(joined) = 1",
        ),
        (
            MYSQL,
            "SELECT name FROM users WHERE joined >= DATE_SUB(CURDATE(), INTERVAL 1 MONTH)",
            "SELECT name FROM users WHERE joined >= CURDATE() - INTERVAL 1 MONTH",
            "SELECT name FROM users WHERE joined >= DATE_SUB(CURDATE(), INTERVAL 1 YEAR)",
        ),
        (
            POSTGRES,
            "SELECT name FROM users WHERE EXTRACT(YEAR FROM joined) = 2023 AND active",
            "SELECT name FROM users WHERE joined >= '2023-01-01' AND joined < '2024-01-01' AND active = TRUE",
            "SELECT name FROM users WHERE EXTRACT(YEAR FROM joined) = 2023",
        ),
        (
            POSTGRES,
            "SELECT name FROM users WHERE name ILIKE '%kim%'",
            "SELECT name FROM users WHERE LOWER(name) LIKE '%kim%'",
            "SELECT name FROM users WHERE name = 'kim'",
        ),
    ],
)
def test_other_dialects_meet_on_witness_databases(
    sandbox: Sandbox, tmp_path: Path, ddl: str, gold: str, right: str, wrong: str
) -> None:
    ground = find_ground(item(ddl, gold), sandbox, Setting(folder=tmp_path))
    assert ground.reason == "" and ground.dialect == ("mysql" if ddl is MYSQL else "postgres")
    assert judge_on(sandbox, ground, gold).verdict == "ok"
    assert judge_on(sandbox, ground, right).verdict == "ok"
    assert judge_on(sandbox, ground, wrong).verdict == "wrong"


def test_what_cannot_be_translated_is_unparsed_and_never_wrong(sandbox: Sandbox, tmp_path: Path) -> None:
    ground = find_ground(
        item(POSTGRES, "SELECT name FROM users WHERE spent > 10"), sandbox, Setting(folder=tmp_path)
    )
    verdict = judge_on(sandbox, ground, "SELECT STDDEV(spent) FROM users")
    assert verdict.verdict == "unparsed" and verdict.evidence and "STDDEV" in verdict.why.upper()
    assert judge_on(sandbox, ground, "").verdict == "unparsed"


def test_a_gold_that_cannot_be_translated_is_not_scored(sandbox: Sandbox, tmp_path: Path) -> None:
    ground = find_ground(item(POSTGRES, "SELECT STDDEV(spent) FROM users"), sandbox, Setting(folder=tmp_path))
    verdict = judge_on(sandbox, ground, "SELECT name FROM users")
    assert (
        verdict.verdict == "error"
        and not verdict.evidence
        and verdict.why.startswith("not scored: the gold query")
    )


def test_the_clock_stands_still(sandbox: Sandbox, database: Path) -> None:
    gold = f"SELECT name FROM players WHERE '{CLOCK[:10]}' > '2000-01-01'"
    for now in ("date('now')", "CURRENT_DATE", "date()"):
        ground = find_ground(item("", gold, database), sandbox, Setting())
        assert (
            judge_on(sandbox, ground, f"SELECT name FROM players WHERE {now} = '{CLOCK[:10]}'").verdict
            == "ok"
        )
        assert (
            judge_on(sandbox, ground, f"SELECT name FROM players WHERE {now} > '{CLOCK[:10]}'").verdict
            == "wrong"
        )


def test_a_populated_database_comes_first_unless_told(
    sandbox: Sandbox, database: Path, tmp_path: Path
) -> None:
    ddl = (
        "CREATE TABLE players (player_id INTEGER PRIMARY KEY, name TEXT NOT NULL, score REAL, level INTEGER);"
    )
    gold, miss = "SELECT name FROM players WHERE score > 85", "SELECT name FROM players WHERE score > 86"
    own = find_ground(item(ddl, gold, database), sandbox, Setting(folder=tmp_path))
    made = find_ground(item(ddl, gold, database), sandbox, Setting(folder=tmp_path, witness="always"))
    assert own.databases == (database,) and own.witness is None and own.record == {}
    assert database not in made.databases and made.record["mutants"] == made.record["killed"] > 0
    assert judge_on(sandbox, own, miss).verdict == "ok"  # no row between 85 and 86
    assert judge_on(sandbox, made, miss).verdict == "wrong"


def test_alternatives_are_met_one_by_one(sandbox: Sandbox, tmp_path: Path) -> None:
    """What equals one accepted query here and another one there equals neither."""
    ddl = (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, n INTEGER NOT NULL);"
    )
    one, other = "SELECT name FROM t WHERE n > 10", "SELECT id, name FROM t WHERE n > 10"
    ground = find_ground(item(ddl, one, None, "", other), sandbox, Setting(folder=tmp_path))
    assert judge_on(sandbox, ground, one).verdict == judge_on(sandbox, ground, other).verdict == "ok"
    assert judge_on(sandbox, ground, "SELECT id FROM t WHERE n > 10").verdict == "wrong"


@pytest.mark.parametrize("context", ["", "nonsense", "CREATE TABLE", "\x00" * 50, "(" * 5000])
def test_bad_ddl_is_a_reason(sandbox: Sandbox, tmp_path: Path, context: str) -> None:
    ground = find_ground(item(context, "SELECT 1"), sandbox, Setting(folder=tmp_path))
    verdict = judge_on(sandbox, ground, "SELECT 1")
    assert ground.databases == () and verdict.verdict == "error" and not verdict.evidence
