"""Which rows of a sorted answer may change places."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Sandbox
from quantlab.text2sql.scoring.execution import run_gold
from quantlab.text2sql.scoring.order_by import order_plan


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT name FROM players",
        "SELECT name FROM (SELECT name FROM players ORDER BY score)",
        "SELECT name, RANK() OVER (ORDER BY score) FROM players",
        "SELECT name FROM players WHERE score = (SELECT score FROM players ORDER BY score LIMIT 1)",
        "SELECT 'ORDER BY' FROM players",
    ],
)
def test_only_the_outermost_order_by_sorts(sql: str) -> None:
    assert order_plan(sql) is None


@pytest.mark.parametrize(
    ("sql", "sizes"),
    [
        # players by score: 90.5 | 80, 80, 80 | NULL
        ("SELECT name FROM players ORDER BY score DESC", [(1, 1), (3, 3), (1, 1)]),
        ("SELECT name FROM players ORDER BY score DESC LIMIT 2", [(1, 1), (1, 3)]),
        ("SELECT name FROM players ORDER BY score DESC LIMIT 1 OFFSET 2", [(1, 3)]),
        ("SELECT name FROM players ORDER BY score DESC LIMIT 2, 2", [(2, 3)]),
        ("SELECT name FROM players ORDER BY score DESC, name", [(1, 1)] * 5),
        ("SELECT name, score AS s FROM players ORDER BY s DESC LIMIT 2", [(1, 1), (1, 3)]),
        ("SELECT name, score FROM players ORDER BY 2 DESC LIMIT 2", [(1, 1), (1, 3)]),
        ("SELECT * FROM players ORDER BY level LIMIT 1", [(1, 2)]),
        ("SELECT name FROM players ORDER BY score * 2 + level DESC LIMIT 1", [(1, 1)]),
        ("SELECT level, COUNT(*) AS n FROM players GROUP BY level ORDER BY COUNT(*) DESC LIMIT 1", [(1, 2)]),
        ("SELECT level FROM players GROUP BY level ORDER BY COUNT(*) DESC LIMIT 1", [(1, 2)]),
        ("SELECT DISTINCT level FROM players ORDER BY players.level", [(1, 1)] * 3),
        ("SELECT name FROM teams UNION SELECT name FROM players ORDER BY name LIMIT 2", [(1, 1)] * 2),
        ("WITH c AS (SELECT * FROM players) SELECT name FROM c ORDER BY level DESC LIMIT 1", [(1, 2)]),
        ("SELECT level * 0 AS z, name FROM players ORDER BY z + 1", [(5, 5)]),
        # No probe: the order counts as it came.
        ("SELECT DISTINCT name FROM players ORDER BY score LIMIT 2", [(1, 1)] * 2),
        ("SELECT name FROM players ORDER BY score DESC LIMIT 1 + 1", [(1, 1)] * 2),
    ],
)
def test_tie_groups(sandbox: Sandbox, database: Path, sql: str, sizes: list[tuple[int, int]]) -> None:
    gold = run_gold(sandbox, database, sql)
    assert gold.execution.status == "rows", gold.execution.reason
    assert gold.groups is not None
    assert [(group.take, len(group.rows)) for group in gold.groups] == sizes


def test_collations_decide_what_ties(sandbox: Sandbox, database: Path) -> None:
    sql = "SELECT * FROM (SELECT 'a' AS x UNION ALL SELECT 'A' UNION ALL SELECT 'b') ORDER BY x"
    plain, folded = run_gold(sandbox, database, sql), run_gold(sandbox, database, sql + " COLLATE NOCASE")
    assert plain.groups is not None and folded.groups is not None
    assert [len(group.rows) for group in plain.groups] == [1, 1, 1]
    assert [len(group.rows) for group in folded.groups] == [2, 1]
