"""Verdicts on whole queries, with a real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.scoring.execution import judge

TOP = "SELECT name FROM players ORDER BY score DESC LIMIT 2"


@pytest.mark.parametrize(
    ("gold", "predicted", "verdict", "words"),
    [
        ("SELECT name FROM players", "SELECT name FROM players ORDER BY name DESC", "ok", ""),
        ("SELECT name, level FROM players", "SELECT level, name FROM players", "ok", "another order"),
        (
            TOP,
            "SELECT name FROM players WHERE name IN ('가람', '라온')",
            "ok",
            "",
        ),  # a tie, cut the other way
        (TOP, "SELECT name FROM players WHERE name IN ('나래', '라온')", "wrong", "rows differ"),
        (
            "SELECT name FROM players ORDER BY level",
            "SELECT name FROM players ORDER BY level DESC",
            "wrong",
            "row order",
        ),
        (
            "SELECT COUNT(*) FROM players",
            "SELECT COUNT(score) FROM players",
            "wrong",
            "4 where 5 is expected",
        ),
        ("SELECT AVG(level) FROM players", "SELECT SUM(level) * 1.0 / COUNT(*) FROM players", "ok", ""),
        ("SELECT name FROM players", "SELECT name FROM teams", "wrong", "3 rows against 5"),
        ("SELECT name FROM players", "SELECT nam FROM players", "error", "no such column: nam"),
        ("SELECT name FROM players", "SELEC name FROM players", "error", "syntax error"),
        ("SELECT name FROM players", "DELETE FROM players", "error", "DELETE is not allowed"),
        ("SELECT name FROM players", "", "unparsed", "no SQL statement"),
        (
            "SELECT name FROM players",
            "SELECT COUNT(*) FROM " + ", ".join(f"players p{i}" for i in range(12)),
            "timeout",
            "stopped after 5000000 steps",
        ),
        (
            "SELECT name FROM players",
            "SELECT 1 FROM " + ", ".join(f"players p{i}" for i in range(9)),
            "wrong",
            "more than 100000 rows, against 5",
        ),
        ("SELECT name FROM players", "SELECT name FROM players WHERE 1 = 0", "wrong", "0 rows against 5"),
    ],
)
def test_verdicts(
    sandbox: Sandbox, database: Path, gold: str, predicted: str, verdict: str, words: str
) -> None:
    found = judge(sandbox, database, [gold], predicted)
    assert found.verdict == verdict, found
    assert words in found.why
    assert found.evidence


def test_more_rows_than_the_limit_is_wrong_not_an_error(database: Path) -> None:
    with Sandbox(Limits(rows=10)) as sandbox:
        found = judge(sandbox, database, ["SELECT name FROM players"], "SELECT 1 FROM players a, players b")
    assert found.verdict == "wrong"
    assert found.why == "the result has more than 10 rows, against 5"


@pytest.mark.parametrize(
    ("gold", "predicted", "verdict", "words"),
    [
        (
            "SELECT name FROM players WHERE 1 = 0",
            "SELECT name FROM teams WHERE 1 = 0",
            "error",
            "no evidence",
        ),
        (
            "SELECT name FROM players WHERE 1 = 0",
            "SELECT name FROM teams",
            "wrong",
            "3 rows where the gold has none",
        ),
        (
            "SELECT missing FROM players",
            "SELECT name FROM players",
            "error",
            "the gold query fails: no such column",
        ),
    ],
)
def test_a_gold_that_says_nothing_is_no_evidence(
    sandbox: Sandbox, database: Path, gold: str, predicted: str, verdict: str, words: str
) -> None:
    found = judge(sandbox, database, [gold], predicted)
    assert (found.verdict, found.evidence) == (verdict, False)
    assert words in found.why


def test_any_accepted_gold_will_do(sandbox: Sandbox, database: Path) -> None:
    golds = ["SELECT name FROM teams", "SELECT team_id, name FROM teams"]
    assert judge(sandbox, database, golds, "SELECT name, team_id FROM teams").verdict == "ok"
    assert judge(sandbox, database, golds, "SELECT team_id FROM teams").verdict == "wrong"


def test_a_null_equals_only_null(sandbox: Sandbox, database: Path) -> None:
    gold = "SELECT name, team_id FROM players"
    assert (
        judge(sandbox, database, [gold], "SELECT name, COALESCE(team_id, 0) FROM players").verdict == "wrong"
    )
    assert judge(sandbox, database, [gold], "SELECT name, NULLIF(team_id, 0) FROM players").verdict == "ok"
