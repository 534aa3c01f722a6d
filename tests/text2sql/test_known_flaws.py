"""Known flaws of published evaluators, each with the published verdict and ours on the same question.

Where a flaw lies in how a tool executes, its mechanism is written out here and run on a copy of a database; the
rules themselves are those of `quantlab.text2sql.scoring.official.compare`.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy
import pytest

from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.scoring.execution import Verdict, judge
from quantlab.text2sql.scoring.official.compare import RULES, Published, run_published
from quantlab.text2sql.scoring.official.explain import differences
from quantlab.text2sql.scoring.official.sql_eval import broadcast_equal, make_frame

SLOW = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r LIMIT 1000000) SELECT COUNT(*) FROM r"
HANGING = "SELECT instr(hex(zeroblob(450000)), hex(zeroblob(200000)) || '1')"
NAMES = "SELECT name FROM players"


def content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def copy(database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(database, tmp_path / "copy.sqlite"))


def both(
    sandbox: Sandbox, database: Path, rule: str, gold: str, predicted: str, **more: str
) -> tuple[Published, Verdict, list[str]]:
    published = run_published(sandbox, database, rule, gold, predicted, **more)
    ours = judge(sandbox, database, [gold], predicted)
    return published, ours, differences(rule, ours, published, gold, predicted)


# The timeout of Spider's test suite


async def blocking(path: Path, sql: str) -> list[Any]:
    """As there: a coroutine that never awaits anything, so nothing else runs until the query has ended."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


async def with_timeout(path: Path, sql: str, seconds: float) -> list[Any] | str:
    try:
        return await asyncio.wait_for(blocking(path, sql), seconds)
    except TimeoutError:
        return "timeout"


def test_spiders_timeout_does_not_fire(copy: Path) -> None:
    """A million rows take longer than a microsecond, yet the answer comes and counts: the timer is never looked at."""
    assert asyncio.run(with_timeout(copy, SLOW, 1e-6)) == [(1_000_000,)]
    with Sandbox(Limits(steps=100_000)) as sandbox:
        ours = judge(sandbox, copy, [NAMES], SLOW)
        assert (ours.verdict, ours.kind) == ("timeout", "steps")


def test_ours_kills_what_hangs_inside_the_engine_and_goes_on(copy: Path) -> None:
    with Sandbox(Limits(seconds=0.3, grace=0.2)) as sandbox:
        ours = judge(sandbox, copy, [NAMES], HANGING)
        assert ours.verdict == "timeout" and "killed" in ours.why
        assert judge(sandbox, copy, [NAMES], NAMES).verdict == "ok"
        published = run_published(sandbox, copy, "spider-test-suite", NAMES, HANGING)
        assert published.verdict is None and "its timeout does not fire" in published.note
        assert differences("spider-test-suite", ours, published, NAMES, HANGING) == [
            f"the published verdict cannot be told: {published.note}"
        ]


# BIRD and statements that write


def mini_dev(path: Path, predicted: str, gold: str) -> int:
    """As there: one plain connection, the prediction first, then the gold, nothing committed; an error is 0."""
    connection = sqlite3.connect(path)
    try:
        cursor = connection.cursor()
        cursor.execute(predicted)
        found = cursor.fetchall()
        cursor.execute(gold)
        return int(set(found) == set(cursor.fetchall()))
    except sqlite3.Error:
        return 0
    finally:
        connection.close()


def two_connections(path: Path, predicted: str, gold: str) -> int:
    """As the script of the full set does it: each query has a connection of its own."""
    results = []
    for sql in (predicted, gold):
        connection = sqlite3.connect(path)
        results.append(set(connection.execute(sql).fetchall()))
        connection.close()
    return int(results[0] == results[1])


@pytest.mark.parametrize(
    "gold", [NAMES, "SELECT name FROM players WHERE 1 = 0", f"{NAMES} ORDER BY score DESC LIMIT 1"]
)
def test_bird_scores_a_delete_as_right(copy: Path, sandbox: Sandbox, gold: str) -> None:
    """The gold runs where the rows are already gone, so even one that has an answer finds none."""
    predicted = "DELETE FROM players"
    before = content(copy)
    assert mini_dev(copy, predicted, gold) == 1
    published, ours, words = both(sandbox, copy, "bird", gold, predicted)
    assert published.verdict is True
    assert (ours.verdict, ours.kind) == ("error", "denied") and "DELETE is not allowed" in ours.why
    assert "a write is run there, here it is denied" in words[0]
    assert content(copy) == before


def test_bird_on_two_connections_scores_a_delete_as_right_where_the_gold_is_empty(copy: Path) -> None:
    assert two_connections(copy, "DELETE FROM players", "SELECT name FROM players WHERE 1 = 0") == 1
    assert two_connections(copy, "DELETE FROM players", NAMES) == 0


def test_bird_lets_drop_table_reach_the_file(copy: Path, sandbox: Sandbox) -> None:
    predicted = "DROP TABLE players"
    before = content(copy)
    published, ours, words = both(sandbox, copy, "bird", NAMES, predicted)
    assert published.verdict is False and "the table is gone" in published.note and words == []
    assert (ours.verdict, ours.kind) == ("error", "denied") and "DROP is not allowed" in ours.why
    assert content(copy) == before
    assert judge(sandbox, copy, [NAMES], NAMES).verdict == "ok"

    assert mini_dev(copy, predicted, NAMES) == 0
    assert content(copy) != before
    assert mini_dev(copy, NAMES, NAMES) == 0  # the right answer to the next question is wrong now


def test_spiders_tool_lets_drop_table_reach_the_file_too(copy: Path, sandbox: Sandbox) -> None:
    gold = "SELECT name FROM teams WHERE 1 = 0"
    published, ours, words = both(sandbox, copy, "spider-test-suite", gold, "DROP TABLE players")
    assert published.verdict is True and ours.verdict == "error"
    assert words[0].startswith("a write is run there") and words[1].startswith("empty equals empty there")
    before = content(copy)
    assert asyncio.run(with_timeout(copy, "DROP TABLE players", 60.0)) == []
    assert content(copy) != before


# BIRD's set()


@pytest.mark.parametrize(
    ("gold", "predicted", "ours_why", "words"),
    [
        (
            f"{NAMES} ORDER BY level DESC",
            f"{NAMES} ORDER BY level",
            "row order differs",
            "the published rule ignores row order",
        ),
        (
            f"{NAMES} ORDER BY name",
            NAMES + " ORDER BY name DESC",
            "row order differs",
            "the published rule ignores row order",
        ),
        (
            "SELECT DISTINCT level FROM players",
            "SELECT level FROM players",
            "5 rows against 3",
            "the published rule accepts duplicates",
        ),
        (
            "SELECT p.name FROM players p JOIN teams t ON t.team_id = p.team_id",
            "SELECT p.name FROM players p, teams t WHERE p.team_id IS NOT NULL",
            "12 rows against 4",  # a cartesian product
            "the published rule accepts duplicates",
        ),
    ],
)
def test_bird_ignores_order_and_duplicates(
    sandbox: Sandbox, database: Path, gold: str, predicted: str, ours_why: str, words: str
) -> None:
    published, ours, found = both(sandbox, database, "bird", gold, predicted)
    assert published.verdict is True
    assert ours.verdict == "wrong" and ours_why in ours.why
    assert found == [words]


def test_bird_wants_columns_where_they_are(sandbox: Sandbox, database: Path) -> None:
    """The other way round: right here, wrong there."""
    published, ours, words = both(
        sandbox, database, "bird", "SELECT name, level FROM players", "SELECT level, name FROM players"
    )
    assert published.verdict is False and ours.verdict == "ok"
    assert words == ["the published rule wants columns in the gold's order"]


# What Spider's test suite takes out, and what it takes for a sort


def test_spider_takes_distinct_out_of_counts(sandbox: Sandbox, database: Path) -> None:
    gold, predicted = "SELECT COUNT(DISTINCT level) FROM players", "SELECT COUNT(level) FROM players"
    published, ours, words = both(sandbox, database, "spider-test-suite", gold, predicted)
    assert published.verdict is True
    assert ours.verdict == "wrong" and ours.why == "5 where 3 is expected"
    assert words == ["DISTINCT is taken out of both queries there before they run"]
    kept = run_published(sandbox, database, "spider-test-suite", gold, predicted, keep_distinct=True)
    assert kept.verdict is False
    # The other way round: here both are three.
    gold, predicted = "SELECT COUNT(*) FROM teams", "SELECT COUNT(DISTINCT level) FROM players"
    published, ours, words = both(sandbox, database, "spider-test-suite", gold, predicted)
    assert published.verdict is False and ours.verdict == "ok"
    assert words == ["DISTINCT is taken out of both queries there before they run"]


def test_spider_takes_any_order_by_for_the_order_of_the_answer(sandbox: Sandbox, database: Path) -> None:
    gold = "SELECT name FROM players WHERE level >= (SELECT level FROM players ORDER BY level LIMIT 1)"
    published, ours, words = both(sandbox, database, "spider-test-suite", gold, f"{NAMES} ORDER BY name DESC")
    assert published.verdict is False and ours.verdict == "ok"
    assert words == ["the published rule takes any ORDER BY in the gold for the order of the answer"]


def test_spider_punishes_ties(sandbox: Sandbox, database: Path) -> None:
    gold, predicted = f"{NAMES} ORDER BY level", f"{NAMES} ORDER BY level, name DESC"
    published, ours, words = both(sandbox, database, "spider-test-suite", gold, predicted)
    assert published.verdict is False and ours.verdict == "ok"
    assert words == ["rows tied under level may change places here, not there"]


# sql-eval and broadcasting


def values_equal(
    gold: list[tuple[Any, ...]], predicted: list[tuple[Any, ...]], columns: tuple[int, int]
) -> bool:
    """As there: the values are compared first; that the shapes differ is only found out if this raises."""
    left, right = (
        numpy.array(rows, dtype=object).reshape(len(rows), width)
        for rows, width in zip((gold, predicted), columns, strict=True)
    )
    try:
        return bool((left == right).all())
    except (ValueError, AttributeError):
        return False


@pytest.mark.parametrize(
    ("gold", "predicted", "ours_verdict"),
    [
        # one value against a table full of it
        ("SELECT COUNT(*) FROM teams", "SELECT 3, 3.0 FROM players", "wrong"),
        # one row against many like it: the grouping was forgotten
        ("SELECT MAX(level), 'x' FROM players", "SELECT 12, 'x' FROM players", "wrong"),
        # one column against two: the first was selected twice
        ("SELECT name FROM teams", "SELECT name, name FROM teams", "wrong"),
        # nothing against any one row: no rows are left to differ
        ("SELECT name FROM players WHERE 1 = 0", "SELECT COUNT(*) FROM players", "wrong"),
        ("SELECT name, level FROM players WHERE 1 = 0", "SELECT 'nobody'", "wrong"),
    ],
)
def test_sql_eval_compares_before_it_looks_at_shapes(
    sandbox: Sandbox, database: Path, gold: str, predicted: str, ours_verdict: str
) -> None:
    published, ours, words = both(sandbox, database, "sql-eval", gold, predicted)
    assert published.verdict is True
    assert ours.verdict == ours_verdict
    assert any("compares values before shapes" in word for word in words)
    left, right = published.gold, published.predicted
    assert left is not None and right is not None
    widths = len(left.columns), len(right.columns)
    assert values_equal(list(left.rows), list(right.rows), widths)
    assert not values_equal([(1, 2)], [(1, 2), (1, 3)], (2, 2))


@pytest.mark.parametrize("height", range(4))
@pytest.mark.parametrize("width", range(1, 4))
def test_broadcasting_is_numpys(height: int, width: int) -> None:
    rows = [tuple(range(width))] * height
    for other_height in range(4):
        for other_width in range(1, 4):
            for others in ([tuple(range(other_width))] * other_height, [(0,) * other_width] * other_height):
                left = make_frame([f"c{i}" for i in range(width)], rows)
                right = make_frame([f"c{i}" for i in range(other_width)], others)
                assert broadcast_equal(left, right) == values_equal(rows, others, (width, other_width))


def test_sql_eval_accepts_columns_too_many(sandbox: Sandbox, database: Path) -> None:
    published, ours, words = both(
        sandbox, database, "sql-eval", "SELECT name FROM teams", "SELECT team_id, name, 1 AS x FROM teams"
    )
    assert published.verdict is True and ours.verdict == "wrong"
    assert words == ["the published rule accepts columns too many"]


# All of them


@pytest.mark.parametrize("rule", RULES)
def test_all_accept_empty_for_empty(sandbox: Sandbox, database: Path, rule: str) -> None:
    """The prediction asks something else altogether; that there is no answer to either makes it right there."""
    gold, predicted = (
        "SELECT name FROM players WHERE level > 99",
        "SELECT name FROM teams WHERE name = 'none'",
    )
    published, ours, words = both(sandbox, database, rule, gold, predicted)
    assert published.verdict is True
    assert (ours.verdict, ours.evidence) == ("error", False) and "no evidence" in ours.why
    assert words == ["empty equals empty there; here an empty gold is no evidence"]


@pytest.mark.parametrize("rule", ["spider-test-suite", "bird"])
@pytest.mark.parametrize(
    "predicted", [" ", "-- nothing", "INSERT INTO teams VALUES (9, 'x')", "CREATE TABLE x (a)"]
)
def test_what_returns_nothing_is_right_where_the_gold_is_empty(
    sandbox: Sandbox, copy: Path, rule: str, predicted: str
) -> None:
    gold = "SELECT name FROM players WHERE level > 99"
    published, ours, words = both(sandbox, copy, rule, gold, predicted)
    assert ours.verdict in ("error", "unparsed")
    if rule == "bird" and predicted.startswith("INSERT"):
        assert published.verdict is None and mini_dev(copy, predicted, gold) == 1
    else:
        assert published.verdict is True and words[-1].startswith("empty equals empty there")
        assert mini_dev(copy, predicted, gold) == 1
