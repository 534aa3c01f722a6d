"""Random queries against other ways to write them, and random text as an answer: never `wrong`, never an exception."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlglot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_queries import Style, Table, build, queries, quoted, schemas, write

from quantlab.text2sql.extraction.extract import extract
from quantlab.text2sql.sandbox.pool import Limits, Sandbox
from quantlab.text2sql.scoring.exact_match import exact_match
from quantlab.text2sql.scoring.execution import judge

BOUNDED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
VERDICTS = {"ok", "wrong", "error", "timeout", "unparsed"}
SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module")
def small() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=5.0, steps=2_000_000)) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def renamed(name: str) -> str:
    """Another name for an alias: Korean, quoted, with a blank."""
    return quoted(f"별 {name}") if name[0] == "n" else f"다른_{name}"


def pretty(sql: str) -> str | None:
    try:
        return sqlglot.transpile(sql, read="sqlite", write="sqlite", pretty=True)[0]
    except sqlglot.errors.SqlglotError:
        return None


@settings(BOUNDED, max_examples=150)
@given(st.data())
def test_a_query_written_otherwise_is_never_wrong(small: Sandbox, folder: Path, data: st.DataObject) -> None:
    tables: list[Table] = data.draw(schemas())
    path = folder / "fuzz.sqlite"
    build(path, tables)
    query = data.draw(queries(tables))
    seed = data.draw(st.integers(0, 999))
    gold = write(query, Style())
    ways = {
        "itself": gold,
        "layout": write(query, Style(seed=seed)),
        "aliases": write(query, Style(free=renamed)),
        "both": write(query, Style(free=renamed, seed=seed)),
        "printed": pretty(gold),
    }
    for way, sql in ways.items():
        if sql is None:
            continue
        found = judge(small, path, [gold], sql)
        assert found.verdict == "ok" if found.evidence else found.verdict != "wrong", (way, gold, sql, found)
        SEEN["with evidence" if found.evidence else found.why[:40]] += 1


def test_most_of_them_said_something() -> None:
    """Random queries that all fail or return nothing would prove nothing."""
    assert not SEEN or SEEN["with evidence"] > sum(SEEN.values()) / 2, SEEN


FRAGMENTS = [
    "SELECT", " * ", " FROM ", "players", " WHERE ", "name", " = ", "'가람'", "'", '"', "`", "(", ")", ";", "\n", "--",
    "/*", "*/", "```sql\n", "```", "</s>", " UNION ", " ORDER BY ", " LIMIT ", "1", "-9e999", "WITH RECURSIVE r AS (",
    "질문에 대한 답은 ", "DROP TABLE players", "PRAGMA x", "EXPLAIN ", "\x00", "\ufeff", "\udcff", "\u2028", "?", ":x",
    " COUNT(", " CASE WHEN ", " END", " OVER (", "x'0", "[", "]", "\\", "$$", "#", "###", "<|im_end|>", " AS ", ",",
]  # fmt: skip
ANYTHING = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
)
GOLD = "SELECT name FROM players ORDER BY score DESC"


@settings(BOUNDED, max_examples=250)
@given(text=ANYTHING)
def test_no_text_makes_the_evaluator_raise(small: Sandbox, database: Path, text: str) -> None:
    found = extract(text)
    assert judge(small, database, [GOLD], found.statement).verdict in VERDICTS
    assert judge(small, database, [GOLD], text).verdict in VERDICTS
    assert judge(small, database, [text], GOLD).verdict in VERDICTS
    exact_match(text, GOLD)
    exact_match(GOLD, text)
