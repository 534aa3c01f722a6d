"""The bundled data is what the builder makes, runs, and keeps test, development and training apart."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quantlab.data.domains import build_database, load_domain
from quantlab.data.exclusions import (
    Exclusions,
    normal_question,
    normal_sql,
    query_aside,
    question_aside,
    read_rows,
)
from quantlab.paths import DATA, bundled
from tools.ko_text2sql import build
from tools.ko_text2sql.splits import is_tied, open_database, says_something

SET = DATA / "ko_text2sql"
DATABASES = SET / "databases"
FIELDS = ["id", "db_id", "db", "tables", "context", "question", "answer", "level", "kind", "database"]


@pytest.fixture(scope="module")
def dev() -> list[dict[str, Any]]:
    return read_rows(SET / "dev.jsonl")


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return read_rows(SET / "train.jsonl")


@pytest.fixture(scope="module")
def test_set() -> list[dict[str, Any]]:
    return read_rows(SET / "test.jsonl")


def test_what_is_committed_is_what_would_be_built() -> None:
    assert build.differences(DATA, bundled("calib")) == []


def test_check_names_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_build(data: Path, calib: Path) -> list[Path]:
        build_database(load_domain("cafe"), data / "cafe.sqlite")
        calib.mkdir()
        for name in ("same.jsonl", "other.jsonl", "missing.jsonl"):
            (calib / name).write_text("fresh", encoding="utf-8")
        return [
            data / "cafe.sqlite",
            *(calib / name for name in ("same.jsonl", "other.jsonl", "missing.jsonl")),
        ]

    monkeypatch.setattr(build, "build", small_build)
    data, calib = tmp_path / "data", tmp_path / "calib"
    small_build(data, calib)
    assert build.differences(data, calib) == []
    (calib / "other.jsonl").write_text("old", encoding="utf-8")
    (calib / "missing.jsonl").unlink()
    with contextlib.closing(sqlite3.connect(data / "cafe.sqlite")) as connection:
        connection.execute("DELETE FROM drinks WHERE rowid = 1")
        connection.commit()
    assert [Path(line.split(" is ")[0]).name for line in build.differences(data, calib)] == [
        "cafe.sqlite",
        "other.jsonl",
        "missing.jsonl",
    ]


def test_development_set_is_balanced(dev: list[dict[str, Any]]) -> None:
    assert len(dev) >= 240
    assert set(Counter(row["db"] for row in dev).values()) == {36}
    assert len({row["db"] for row in dev}) == 7
    levels = Counter(row["level"] for row in dev)
    assert set(levels) == {"easy", "medium", "hard"}
    assert max(levels.values()) - min(levels.values()) <= 10
    assert len({row["kind"] for row in dev}) > 40
    assert [list(row) for row in dev] == [FIELDS] * len(dev)


def test_training_set_is_large_even_and_without_context(train: list[dict[str, Any]]) -> None:
    assert len(train) >= 9000
    sizes = Counter(row["db"] for row in train)
    assert len(sizes) == 7
    assert len(set(sizes.values())) == 1
    assert all("context" not in row for row in train)
    assert len({row["id"] for row in train}) == len(train)


def test_nothing_of_the_game_domain_is_in_dev_or_train(
    dev: list[dict[str, Any]], train: list[dict[str, Any]]
) -> None:
    assert all(row["db_id"] != 1 and row["db"] != "game" for row in [*dev, *train])


def test_no_pair_is_repeated(dev: list[dict[str, Any]], train: list[dict[str, Any]]) -> None:
    for rows in (dev, train):
        assert len({normal_question(row["question"]) for row in rows}) == len(rows)
        assert len({(row["db"], normal_sql(row["answer"])) for row in rows}) == len(rows)


def test_sets_do_not_overlap(
    dev: list[dict[str, Any]], train: list[dict[str, Any]], test_set: list[dict[str, Any]]
) -> None:
    for listed, others in ((test_set, [*dev, *train]), (dev, train)):
        excluded = Exclusions(listed)
        for row in others:
            assert not excluded.meets(row["db"], row["question"], row["answer"])
    for row in dev:
        assert question_aside(row["question"]) and query_aside(row["db"], row["answer"])
    for row in train:
        assert not question_aside(row["question"]) and not query_aside(row["db"], row["answer"])


def test_every_query_runs_and_says_something(dev: list[dict[str, Any]], train: list[dict[str, Any]]) -> None:
    for name in {row["db"] for row in dev}:
        with open_database(DATABASES / f"{name}.sqlite") as connection:
            for row in [*dev, *train[::5]]:
                if row["db"] == name:
                    assert says_something(connection, row["answer"]), row
            for row in dev:
                if row["db"] == name:
                    assert not is_tied(connection, row["answer"]), row


def test_contexts_hold_the_tables_of_the_query(dev: list[dict[str, Any]]) -> None:
    for row in dev:
        domain = load_domain(row["db"])
        assert row["context"] == domain.ddl(row["tables"])
        assert row["tables"] == [table.name for table in domain.tables if table.name in row["tables"]]
        with_others = {
            t.name
            for t in domain.tables
            if f" {t.name} " in row["answer"].replace(";", " ").replace(")", " ")
        }
        assert with_others <= set(row["tables"])


def test_says_something_refuses_empty_null_and_zero() -> None:
    with open_database(DATABASES / "cafe.sqlite") as connection:
        assert not says_something(connection, "SELECT 1 WHERE 1 = 0")
        assert not says_something(connection, "SELECT NULL")
        assert not says_something(connection, "SELECT 0")
        assert says_something(connection, "SELECT 0, 'x'")


def test_ties_at_the_limit_are_found() -> None:
    with open_database(DATABASES / "cafe.sqlite") as connection:
        table = load_domain("cafe").tables[0]
        key = table.key.name
        assert not is_tied(connection, f"SELECT {key} FROM {table.name} ORDER BY {key} ASC LIMIT 3;")
        assert is_tied(connection, f"SELECT {key} FROM {table.name} ORDER BY {key} * 0 ASC LIMIT 3;")
        assert is_tied(
            connection,
            f"SELECT 1 WHERE 1 IN (SELECT {key} FROM {table.name} ORDER BY {key} * 0 ASC LIMIT 1);",
        )


def test_held_out_text_and_calibration_are_apart(
    dev: list[dict[str, Any]], test_set: list[dict[str, Any]]
) -> None:
    held_out = (DATA / "heldout.txt").read_text(encoding="utf-8")
    calibration = [json.loads(line)["text"] for line in _lines("ko-text2sql.jsonl")]
    prose = [json.loads(line)["text"] for line in _lines("en-prose.jsonl")]
    assert 290_000 < len(held_out.encode()) < 330_000
    assert 350_000 < sum(len(text.encode()) for text in calibration) < 750_000
    assert 220_000 < sum(len(text.encode()) for text in prose) < 250_000
    assert not any(text in held_out for text in [*calibration, *prose])
    for text in [held_out, *calibration]:
        assert "###" not in text
        assert "CREATE TABLE guilds" not in text
    everything = "\n".join([held_out, *calibration])
    for row in [*dev, *test_set]:
        assert row["question"] not in everything or len(row["question"]) < 12


def _lines(name: str) -> list[str]:
    return (bundled("calib") / name).read_text(encoding="utf-8").splitlines()


def test_the_data_card_gets_the_sizes() -> None:
    rows = [{"level": "easy", "kind": "lookup"}, {"level": "hard", "kind": "chain"}]
    assert build.data_card("a\n| dev | ? |\nb", {"dev": rows}) == "a\n| dev | 2 | 1 | 0 | 1 | 2 |\nb"
    with pytest.raises(AssertionError):
        build.data_card("no table", {"dev": rows})


def test_the_sources_of_calibration_state_the_sizes() -> None:
    sources = (bundled("calib") / "SOURCES.md").read_text(encoding="utf-8")
    for name in ("ko-text2sql.jsonl", "en-prose.jsonl"):
        assert f"| `{name}` | {len(_lines(name))} |" in sources
