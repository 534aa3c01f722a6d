"""The published rules on results, and what is taken for what their tools would have seen."""

from __future__ import annotations

import itertools
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import RecipeError
from quantlab.text2sql.sandbox.pool import Execution, Limits, Sandbox
from quantlab.text2sql.scoring.execution import Verdict, judge
from quantlab.text2sql.scoring.official.compare import (
    RULES,
    Published,
    gold_after,
    published_query,
    published_verdict,
    run_published,
    seen,
)
from quantlab.text2sql.scoring.official.explain import differences

Rows = list[tuple[Any, ...]]
VALUES = st.sampled_from([1, 2, 1.0, 2.5, None, "a", "b", "1"])
SORTED = "SELECT x FROM t ORDER BY y"


def verdict(rule: str, gold: Rows, predicted: Rows, gold_sql: str = "SELECT x FROM t", **more: Any) -> bool:
    columns = [[f"c{i}" for i in range(len(rows[0]) if rows else 1)] for rows in (gold, predicted)]
    names = more.pop("names", columns)
    return published_verdict(rule, gold_sql, names[0], gold, more.pop("sql", ""), names[1], predicted, **more)


@pytest.mark.parametrize(
    ("gold", "predicted", "sql", "expected"),
    [
        ([(1, "a"), (2, "b")], [("b", 2), ("a", 1)], "SELECT x", True),
        ([(1, "a"), (2, "b")], [("b", 2), ("a", 1)], SORTED, False),
        ([(1, "a"), (2, "b")], [("a", 1), ("b", 2)], SORTED, True),
        ([(1,), (1,)], [(1,)], "SELECT x", False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], "SELECT x", False),
        ([(1,)], [(1, 1)], "SELECT x", False),
        ([(1,)], [(1.0,)], "SELECT x", True),
        ([(1, 1.5)], [(1.0, 1.5)], "SELECT x", False),  # printed, 1.0 sorts before 1.5 and 1 behind it
        ([(0.1 + 0.2,)], [(0.3,)], "SELECT x", False),
        ([("1",)], [(1,)], "SELECT x", False),
        ([(None,)], [(None,)], "SELECT x", True),
        ([], [], "SELECT x", True),
        ([(1,)], [], "SELECT x", False),
        ([("a\udcff",)], [("a",)], "SELECT x", True),  # bytes that are no UTF-8 are dropped
        ([(1, 2, 1), (2, 1, 1)], [(1, 1, 2), (1, 2, 1)], "SELECT x", True),
        ([(1, 2), (2, 1)], [(1, 1), (2, 2)], "SELECT x", False),  # each column the same, the rows not
    ],
)
def test_spider(gold: Rows, predicted: Rows, sql: str, expected: bool) -> None:
    assert verdict("spider-test-suite", gold, predicted, sql) is expected


@given(
    st.integers(1, 4).flatmap(
        lambda width: st.tuples(
            st.lists(st.tuples(*[VALUES] * width), max_size=5),
            st.lists(st.tuples(*[VALUES] * width), max_size=5),
        )
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_spider_finds_a_permutation_where_there_is_one(
    tables: tuple[Rows, Rows], ordered: bool, rng: random.Random
) -> None:
    """Against all permutations tried one by one, on results that are alike more often than chance has it."""
    gold, predicted = tables
    if rng.random() < 0.7 and gold:
        order = rng.sample(range(len(gold[0])), len(gold[0]))
        predicted = [tuple(row[i] for i in order) for row in gold]
        if rng.random() < 0.5:
            rng.shuffle(predicted)
    found = verdict("spider-test-suite", gold, predicted, SORTED if ordered else "SELECT x")
    assert found == by_enumeration(gold, predicted, ordered)


def by_enumeration(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    if not gold or not predicted:
        return not gold and not predicted
    if len(gold) != len(predicted):
        return False

    def printed(rows: Rows) -> Any:
        unordered = [tuple(sorted(row, key=lambda value: str(value) + str(type(value)))) for row in rows]
        return unordered if ordered else set(unordered)

    if printed(gold) != printed(predicted):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        moved = [tuple(row[i] for i in order) for row in predicted]
        if moved == gold or (
            not ordered and all(moved.count(row) == gold.count(row) for row in moved + gold)
        ):
            return True
    return False


def test_spider_ends_on_many_like_columns() -> None:
    """Twelve columns of two values in all orders: 479 million permutations."""
    rng = random.Random(0)
    gold = [tuple(rng.randrange(2) for _ in range(12)) for _ in range(40)]
    order = rng.sample(range(12), 12)
    assert verdict("spider-test-suite", gold, [tuple(row[i] for i in order) for row in reversed(gold)])
    assert verdict("spider-test-suite", gold, [(1 - row[0], *row[1:]) for row in gold]) is False


@pytest.mark.parametrize(
    ("sql", "rewritten"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
        ("select count(distinct a) from t", "select count( a) from t"),
        ("SELECT 'distinct; x', \"DISTINCT\" FROM t", "SELECT 'distinct; x', \"DISTINCT\" FROM t"),
        ("SELECT distinct_id FROM t", "SELECT distinct_id FROM t"),
        ("SELECT a -- distinct; b\nFROM t", "SELECT a -- distinct; b\nFROM t"),
        ("SELECT 1; DROP TABLE t", "SELECT 1;"),
        ("SELECT a FROM t WHERE a > = 1 AND b ! = 2", "SELECT a FROM t WHERE a >= 1 AND b != 2"),
        ("SELECT a FROM t WHERE y = year( CURDATE () ) ", "SELECT a FROM t WHERE y = 2020"),
        ("SELECT a FROM t WHERE b = value ", "SELECT a FROM t WHERE b = 1 "),
        ("", ""),
    ],
)
def test_spider_rewrites_queries(sql: str, rewritten: str) -> None:
    assert published_query("spider-test-suite", sql) == rewritten
    assert published_query("bird", sql) == published_query("sql-eval", sql) == sql


@pytest.mark.parametrize("piece", ["/*", "'", '"', "(", "--", ";", "/* ", "''"])
def test_hostile_text_is_rewritten_in_one_pass(piece: str) -> None:
    """At a second look for each comment that never ends, 200,000 characters would take minutes."""
    sql = "DELETE FROM players " + piece * (200_000 // len(piece))
    assert published_query("spider-test-suite", sql)
    assert seen("bird", sql, Execution("error", "denied", "why")) == ((), ())


def test_spider_rewrites_golds_a_little_less() -> None:
    sql = "SELECT DISTINCT a FROM t WHERE b = value "
    assert published_query("spider-test-suite", sql, "gold") == "SELECT  a FROM t WHERE b = value "
    assert published_query("spider-test-suite", sql, "gold", keep_distinct=True) == sql


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ([(1,), (2,)], [(2,), (1,), (1,)], True),
        ([(1, 2)], [(2, 1)], False),
        ([(1,)], [(1.0,)], True),
        ([(0.1 + 0.2,)], [(0.3,)], False),
        ([(None,)], [(None,)], True),
        ([], [], True),
        ([("x\udc80",)], [("x\udc80",)], False),  # the script's connection raises on it
        ([(b"x",)], [(b"x",)], True),
    ],
)
def test_bird(gold: Rows, predicted: Rows, expected: bool) -> None:
    assert verdict("bird", gold, predicted) is expected
    assert verdict("bird", gold, predicted, SORTED) is expected


@pytest.mark.parametrize(
    ("gold", "predicted", "more", "expected"),
    [
        ([(1,), (2,)], [(2,), (1,)], {}, True),
        ([(2,), (1,)], [(1,), (2,)], {"category": "order_by"}, False),
        ([(2,), (1,)], [(1,), (2,)], {"question": "Sort them, please"}, False),
        ([(2,), (1,)], [(1,), (2,)], {"question": "in disorder"}, True),
        # an ORDER BY in both is sorted away, one in the gold alone is not
        ([(2,), (1,)], [(1,), (2,)], {"category": "order_by", "sql": SORTED, "gold_sql": SORTED}, True),
        ([(1,), (2,)], [(2,), (1,)], {"category": "order_by", "gold_sql": "S ORDER BY c0 ASC"}, False),
        ([(1,), (2,)], [(2,), (1,)], {"category": "order_by", "sql": "S ORDER BY c0 ASC"}, True),
        ([(1,), (1,), (2,)], [(1,), (2,)], {}, True),  # duplicates go
        ([(1, "a")], [("a", 1)], {"names": (["x", "y"], ["y", "x"])}, True),  # columns are sorted by name
        ([(1, "a")], [("a", 1)], {"names": (["x", "y"], ["p", "q"])}, True),  # or found by what they hold
        ([("a",)], [(7, "a")], {}, True),
        ([(7, "a")], [("a",)], {}, False),
        ([(1, 2), (2, 1)], [(1, 1), (2, 2)], {}, False),
        ([(1.0,)], [(1.000001,)], {}, True),
        ([(1.0,)], [(1.0001,)], {}, False),
        ([(1_000_000,)], [(1_000_001,)], {}, False),  # integers compare exactly
        ([(1,), (None,)], [(1,), (None,)], {}, True),  # NaN equals NaN when columns are matched
        ([("a",), (None,)], [(None,), ("a",)], {}, True),
        ([], [], {}, True),
        ([], [(1,), (2,)], {}, False),
        ([(1, 2), (3, 4)], [(2, 1), (4, 3)], {"names": (["x", "y"], ["z", "z"])}, False),  # pandas raises
        ([(1, 2)], [(1, 2)], {"names": (["z", "z"], ["z", "z"])}, True),  # not before the first comparison
        ([(1,), ("a",), (2,)], [("a",), (1,), (2,)], {}, False),  # numbers and text in one column do not sort
    ],
)  # fmt: skip
def test_sql_eval(gold: Rows, predicted: Rows, more: dict[str, Any], expected: bool) -> None:
    assert verdict("sql-eval", gold, predicted, **more) is expected


def test_an_unknown_rule() -> None:
    for call in (lambda: verdict("brid", [], []), lambda: published_query("brid", "")):
        with pytest.raises(RecipeError, match="no published rule 'brid'") as caught:
            call()
        assert caught.value.hint == "did you mean bird?"


# What the tools would have seen


def ended(kind: str, status: Any = "error") -> Execution:
    return Execution(status, kind, "why")


@pytest.mark.parametrize(
    ("sql", "kind", "outcome"),
    [
        ("DELETE FROM t", "denied", "rows"),
        ("/* x */ insert into t values (1)", "denied", "rows"),
        ("WITH c AS (SELECT 1) DELETE FROM t", "denied", "rows"),
        ("DELETE FROM t RETURNING a", "denied", "unknown"),
        ("PRAGMA table_info(t)", "denied", "unknown"),
        ("SELECT load_extension('x')", "denied", "unknown"),
        ("WITH c AS (SELECT load_extension('x')) SELECT * FROM c", "denied", "unknown"),
        ("COMMIT", "denied", "unknown"),
        ("", "empty", "rows"),
        ("SELEC", "sql", "error"),
        ("SELECT 1; SELECT 2", "several", "error"),
        ("SELECT 1", "too_many_rows", "unknown"),
        ("SELECT 1", "crash", "unknown"),
    ],
)
def test_what_they_would_have_seen(sql: str, kind: str, outcome: str) -> None:
    for rule in ("spider-test-suite", "bird"):
        found = seen(rule, sql, ended(kind))
        assert found == (((), ()) if outcome == "rows" else outcome)
    expected = {"rows": "error", "error": "unknown" if kind == "several" else "error"}
    assert seen("sql-eval", sql, ended(kind)) == expected.get(outcome, outcome)


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_rows(rule: str) -> None:
    execution = Execution("rows", "rows", "", ("a",), ((1,),))
    assert seen(rule, "SELECT 1 AS a", execution) == (("a",), ((1,),))
    assert seen(rule, "SELECT", ended("steps", "timeout")) == "unknown"


DELETES = [
    "DELETE FROM players",
    "DELETE FROM players WHERE level > 9",
    "delete from PLAYERS as p where p.score is null or p.team_id = 2",
    "DELETE FROM players WHERE score > 80",  # NULL is not true: that row stays
    "DELETE FROM players WHERE players.team_id IN (SELECT team_id FROM teams WHERE name = '청룡')",
    "DELETE FROM teams WHERE team_id = 3",
]
GOLDS = [
    "SELECT name FROM players",
    "SELECT COUNT(*), AVG(score) FROM players AS p WHERE p.level > 9",
    "SELECT t.name, COUNT(p.name) FROM teams t LEFT JOIN players p USING (team_id) GROUP BY 1 ORDER BY 2",
    "WITH high AS (SELECT * FROM players WHERE level > 9) SELECT name FROM high UNION SELECT name FROM teams",
    " with recursive n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT i, name FROM n, players",
]


@pytest.mark.parametrize("predicted", DELETES)
def test_the_gold_after_a_delete(sandbox: Sandbox, database: Path, tmp_path: Path, predicted: str) -> None:
    """Against what a connection really gives that has deleted first."""
    connection = sqlite3.connect(shutil.copy(database, tmp_path / "copy.sqlite"))
    connection.execute(predicted)
    for gold in GOLDS:
        after = gold_after(predicted, gold)
        assert after is not None
        found = sandbox.run(database, after, role="gold")
        assert found.status == "rows", found
        assert sorted(map(repr, found.rows)) == sorted(map(repr, connection.execute(gold).fetchall())), gold
    connection.close()


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("DROP TABLE players", ""),
        ("DROP TABLE IF EXISTS Players", ""),
        ("DROP TABLE teams", "same"),
        ("CREATE TABLE x (a)", "same"),
        ("VACUUM", "same"),
        ("UPDATE players SET level = 0", None),
        ("INSERT INTO players VALUES (9, 'x', 1, 1, 1)", None),
        ("DELETE FROM players WHERE level = (SELECT MAX(level) FROM players)", None),
        ("WITH c AS (SELECT 1) DELETE FROM players", None),
        ("ALTER TABLE players RENAME TO p", None),
        ("DELETE FROM", None),
    ],
)
def test_the_gold_after_other_statements(predicted: str, expected: str | None) -> None:
    gold = "SELECT name FROM players"
    assert gold_after(predicted, gold) == (gold if expected == "same" else expected)


@pytest.mark.parametrize(
    ("predicted", "verdict", "note"),
    [
        ("SELECT name FROM players", True, ""),
        ("SELECT nam FROM players", False, "an error there too: no such column: nam"),
        ("UPDATE players SET level = 0", None, "on what the write has left"),
        ("SELECT 1 FROM players a, players b, players c", None, "not known what the tool makes of it"),
    ],
)
def test_running_by_a_published_rule(database: Path, predicted: str, verdict: bool | None, note: str) -> None:
    with Sandbox(Limits(rows=100)) as sandbox:
        found = run_published(sandbox, database, "bird", "SELECT name FROM players", predicted)
    assert found.verdict is verdict and note in found.note


def test_a_gold_that_does_not_run(sandbox: Sandbox, database: Path) -> None:
    found = run_published(sandbox, database, "bird", "SELECT nam FROM players", "SELECT name FROM players")
    assert found.verdict is None and "the gold does not run here" in found.note


def test_a_test_suite_is_met_on_all_its_databases(sandbox: Sandbox, database: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(database, tmp_path / "other.sqlite"))
    connection = sqlite3.connect(other)
    connection.execute("INSERT INTO players VALUES (6, 'x', 95.0, 3, 1)")
    connection.commit()
    connection.close()
    gold, predicted = "SELECT name FROM players WHERE score > 90", "SELECT name FROM players WHERE level = 10"
    rule = "spider-test-suite"
    assert run_published(sandbox, database, rule, gold, predicted).verdict is True
    assert run_published(sandbox, [database, other], rule, gold, predicted).verdict is False
    assert run_published(sandbox, [], rule, gold, predicted).verdict is None
    assert run_published(sandbox, database, rule, [], predicted).verdict is None


def test_any_of_several_golds_is_met(sandbox: Sandbox, database: Path) -> None:
    predicted = "SELECT team_id FROM teams"
    golds = ["SELECT name FROM teams", "SELECT team_id FROM teams", "SELECT team_id, name FROM teams"]
    assert run_published(sandbox, database, "sql-eval", golds, predicted).verdict is True
    assert run_published(sandbox, database, "sql-eval", [golds[0], golds[2]], predicted).verdict is False
    # One that does not run might have been met there.
    assert (
        run_published(sandbox, database, "sql-eval", [golds[0], "SELECT x", golds[2]], predicted).verdict
        is None
    )


# Words


def test_no_words_where_both_agree(sandbox: Sandbox, database: Path) -> None:
    gold = "SELECT name FROM players"
    for rule in RULES:
        for predicted in (gold, "SELECT name FROM teams", "SELECT nam FROM players"):
            published = run_published(sandbox, database, rule, gold, predicted)
            ours = judge(sandbox, database, [gold], predicted)
            assert differences(rule, ours, published, gold, predicted) == []


@pytest.mark.parametrize(
    ("rule", "gold", "predicted", "words"),
    [
        ("bird", "SELECT 0.3", "SELECT 0.1 + 0.2", "compares floats exactly"),
        ("spider-test-suite", "SELECT 0.3", "SELECT 0.1 + 0.2", "compares floats exactly"),
        ("sql-eval", "SELECT 1.0", "SELECT 1.000005", "forgives a relative error"),
        ("sql-eval", "SELECT 1 AS a, 2 AS a", "SELECT 2 AS a, 1 AS a", "two columns of one name"),
        (
            "bird",
            "SELECT name FROM players ORDER BY score DESC LIMIT 2",
            "SELECT name FROM players WHERE name IN ('가람', '라온')",
            "rows tied under score DESC may change places",
        ),
        ("spider-test-suite", "SELECT 1 AS a, 1.5 AS b", "SELECT 1.0, 1.5", "the published rule compares"),
    ],
)
def test_words(sandbox: Sandbox, database: Path, rule: str, gold: str, predicted: str, words: str) -> None:
    published = run_published(sandbox, database, rule, gold, predicted)
    ours = judge(sandbox, database, [gold], predicted)
    assert published.verdict is not (ours.verdict == "ok")
    found = differences(rule, ours, published, gold, predicted)
    assert any(words in reason for reason in found), found


@given(
    st.sampled_from(RULES),
    st.sampled_from(["ok", "wrong", "error", "timeout", "unparsed"]),
    st.sampled_from([True, False, None]),
    st.lists(st.tuples(VALUES, VALUES), max_size=3),
    st.lists(st.tuples(VALUES), max_size=3),
    st.text(max_size=30),
)
def test_words_are_found_for_anything(
    rule: str, ours: str, verdict: bool | None, gold: Rows, predicted: Rows, sql: str
) -> None:
    wanted = Execution("rows", "rows", "", ("a", "b"), tuple(gold))
    published = Published(verdict, "n", wanted, Execution("rows", "rows", "", ("a",), tuple(predicted)))
    found = differences(rule, Verdict(ours, "why"), published, sql, sql)
    assert bool(found) == (verdict is None or verdict != (ours == "ok")) and all(found)
