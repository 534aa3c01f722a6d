"""The handwritten test set: every answer runs, says something, and can be found from the context and the question."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantlab.data.domains import build_database, load_domain
from quantlab.errors import DataError
from tools.ko_text2sql.handwritten import TEST_SET, context_tables, handwritten_rows, used_tables

ROWS: list[dict[str, Any]] = [json.loads(line) for line in TEST_SET.read_text(encoding="utf-8").splitlines()]
GAME = load_domain("game")
each_row = pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
STYLE = re.compile(r"SELECT [^;\n]+;")
LITERAL = re.compile(r"'([^']*)'")
NOT_IN_WORDS = re.compile(r"\d{4}-\d\d-\d\d|%Y(-%m)?")  # dates are asked for in words


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    path: Path = tmp_path_factory.mktemp("game") / "game.sqlite"
    build_database(GAME, path)
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    yield connection
    connection.close()


def test_the_file_is_made_from_the_yaml() -> None:
    assert handwritten_rows() == ROWS, "run python -m tools.ko_text2sql.handwritten"


def test_there_are_enough_questions_of_every_level_and_none_twice() -> None:
    assert len(ROWS) >= 120
    levels = Counter(row["level"] for row in ROWS)
    assert levels["easy"] >= 35 and levels["medium"] >= 40 and levels["hard"] >= 30
    assert len({row["question"] for row in ROWS}) == len({row["answer"] for row in ROWS}) == len(ROWS)
    assert len({row["kind"] for row in ROWS}) >= 20
    assert {table for row in ROWS for table in used_tables(GAME, row["answer"])} == {
        t.name for t in GAME.tables
    }


@each_row
def test_the_answer_runs_and_returns_something(row: dict[str, Any], game: sqlite3.Connection) -> None:
    assert (row["db_id"], row["db"], row["database"]) == (1, "game", "databases/game.sqlite")
    assert STYLE.fullmatch(row["answer"])
    cells = [cell for record in game.execute(row["answer"]) for cell in record]
    assert any(cell is not None for cell in cells)
    assert len(cells) > 1 or cells[0] != 0  # a count of nothing proves nothing


@each_row
def test_the_context_holds_every_table_the_answer_reads(
    row: dict[str, Any], game: sqlite3.Connection
) -> None:
    read: set[str] = set()

    def watch(action: int, name: str | None, *_: object) -> int:
        if action == sqlite3.SQLITE_READ and name:
            read.add(name)
        return sqlite3.SQLITE_OK

    game.set_authorizer(watch)
    game.execute("EXPLAIN " + row["answer"])
    game.set_authorizer(None)
    assert read and read <= set(row["tables"])
    assert 1 <= len(row["tables"]) - len(read) <= 2
    assert row["context"] == GAME.ddl(row["tables"])
    assert row["tables"] == [table.name for table in GAME.tables if table.name in row["tables"]]
    # alone, the context is enough to prepare the query
    empty = sqlite3.connect(":memory:")
    empty.executescript(row["context"])
    empty.execute(row["answer"])
    empty.close()


@each_row
def test_values_stand_in_the_question_as_they_are_stored(row: dict[str, Any]) -> None:
    for literal in LITERAL.findall(row["answer"]):
        if not NOT_IN_WORDS.fullmatch(literal):
            assert literal.strip("%") in row["question"]


@each_row
def test_the_order_of_the_answer_is_not_left_to_chance(row: dict[str, Any], game: sqlite3.Connection) -> None:
    """Ties within ORDER BY, or at a LIMIT, would make several answers right."""
    answer = row["answer"]
    if " ORDER BY " not in answer:
        assert " LIMIT " not in answer
        return
    shuffled = answer.replace(" LIMIT ", ", RANDOM() LIMIT ")
    if shuffled == answer:
        shuffled = answer.rstrip(";") + ", RANDOM();"
    expected = game.execute(answer).fetchall()
    assert all(game.execute(shuffled).fetchall() == expected for _ in range(10))


@each_row
def test_the_filter_matters(row: dict[str, Any], game: sqlite3.Connection) -> None:
    """Without its last WHERE or HAVING the query says something else."""
    last = max(row["answer"].rfind(" WHERE "), row["answer"].rfind(" HAVING "))
    if last < 0 or "(" in row["answer"][last:]:
        return
    rest = row["answer"][last:]
    end = min(
        (rest.find(word) for word in (" GROUP BY ", " ORDER BY ", " LIMIT ", ")", ";") if word in rest),
        default=0,
    )
    without = row["answer"][:last] + rest[end:]
    assert Counter(game.execute(without)) != Counter(game.execute(row["answer"]))


def test_the_context_is_drawn_reproducibly_and_never_lacks_a_used_table() -> None:
    used = ("players", "purchases")
    drawn = {context_tables(GAME, used, str(seed)) for seed in range(50)}
    assert context_tables(GAME, used, "7") == context_tables(GAME, used, "7")
    assert all(set(used) < set(tables) and len(tables) in (3, 4) for tables in drawn)
    assert len(drawn) > 10
    everything = tuple(table.name for table in GAME.tables)
    assert context_tables(GAME, everything, "1") == everything


def test_a_query_on_an_unknown_table_is_refused() -> None:
    with pytest.raises(DataError, match="no table authors"):
        used_tables(GAME, "SELECT name FROM authors;")
