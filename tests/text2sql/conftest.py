"""A small populated database that the SQL tests share."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Limits, Sandbox

SCHEMA = """
CREATE TABLE teams (team_id INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE players (
  player_id INTEGER PRIMARY KEY, name TEXT NOT NULL, score REAL, level INTEGER NOT NULL, team_id INTEGER
);
INSERT INTO teams VALUES (1, '청룡'), (2, '백호'), (3, '빈 팀');
INSERT INTO players VALUES
  (1, '가람', 90.5, 10, 1), (2, '나래', 80.0, 12, 1), (3, '다온', 80.0, 12, 2), (4, '라온', 80.0, 9, 2),
  (5, '마루', NULL, 9, NULL);
"""


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # blanks, Korean and URI characters in the name
    path = tmp_path_factory.mktemp("db") / "선수들 #1?.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    connection.close()
    return path


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=2.0, steps=5_000_000), workers=2) as sandbox:
        yield sandbox
