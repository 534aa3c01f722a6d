"""Exact match: what is forgiven and what is not."""

from __future__ import annotations

import pytest

from quantlab.text2sql.scoring.exact_match import exact_match, normalize

SAME = [
    ("SELECT a FROM t;", "select  A\nfrom T"),
    (
        "SELECT p.name FROM players AS p INNER JOIN teams t ON p.tid = t.id",
        "SELECT T1.name FROM players T1 JOIN teams AS T2 ON T1.tid=T2.id;",
    ),
    ("SELECT name FROM players WHERE players.a = 1", "SELECT p.name FROM players p WHERE p.a = 1"),
    ("SELECT a FROM t WHERE b <> 1 ORDER BY a ASC", "SELECT a FROM t WHERE b != 1 ORDER BY a"),
    ('SELECT "a" FROM `t` -- comment', "SELECT a FROM t"),
    ("SELECT * FROM a LEFT OUTER JOIN b ON a.x = b.x", "SELECT * FROM a LEFT JOIN b ON a.x = b.x"),
]

DIFFERENT = [
    ("SELECT a FROM t WHERE b = 'X'", "SELECT a FROM t WHERE b = 'x'"),
    ("SELECT a, b FROM t", "SELECT b, a FROM t"),
    ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a DESC"),
    ("SELECT DISTINCT a FROM t", "SELECT a FROM t"),
    ("SELECT T1.a FROM t T1 JOIN u T2 ON T1.x = T2.x", "SELECT T2.a FROM t T1 JOIN u T2 ON T1.x = T2.x"),
    ("SELECT a FROM t LIMIT 1", "SELECT a FROM t LIMIT 2"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_same(left: str, right: str) -> None:
    assert exact_match(left, right), (normalize(left), normalize(right))


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different(left: str, right: str) -> None:
    assert not exact_match(left, right)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(" * 3000,
        "SELECT " + "(" * 900 + "1" + ")" * 900,
        "SELECT " + "NOT " * 3000 + "1",
        "SELECT 'a",
        "1; 2",
        "x" * 50_000,
    ],
)
def test_what_is_not_one_statement_has_no_normal_form_and_does_no_harm(text: str) -> None:
    assert normalize(text) is None
    assert exact_match(text, text)
    assert not exact_match(text, "SELECT 1")
