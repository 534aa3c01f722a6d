"""The database under attack, a sandbox with small limits, and what has to hold after every attack."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantlab.text2sql.sandbox.pool import Execution, Limits, Sandbox

LIMITS = Limits(
    seconds=0.6, grace=0.4, steps=3_000_000, rows=10_000, result_bytes=2_000_000, memory_bytes=64 * 2**20
)
PATIENCE = 30.0  # not a measurement: without limits these would take years, and the machine may be busy

Attack = Callable[[Path, str, str], Execution]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("victim") / "victim.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TABLE players (player_id INTEGER PRIMARY KEY, name TEXT NOT NULL, level INTEGER NOT NULL)"
    )
    connection.executemany(
        "INSERT INTO players (name, level) VALUES (?, ?)", [(f"선수{i}", i) for i in range(50)]
    )
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="session")
def limits() -> Limits:
    return LIMITS


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file of the folder with its hash, pipes and dangling links by name only."""
    return {
        found.name: hashlib.sha256(found.read_bytes()).hexdigest() if found.is_file() else ""
        for found in folder.iterdir()
    }


@pytest.fixture
def attack(sandbox: Sandbox, victim: Path) -> Attack:
    """Run `sql` on a file and check what every attack has to leave: each file as it was, none beside it, the sandbox
    alive. `kinds` are the kinds the execution may be of, apart by `|`; "rows" among them means it may be harmless.
    """

    def run(path: Path, sql: str, kinds: str) -> Execution:
        before = fingerprint(path.parent)
        started = time.monotonic()
        found = sandbox.run(path, sql)
        assert time.monotonic() - started < PATIENCE
        assert found.kind in kinds.split("|"), (found.status, found.kind, found.reason)
        expected = {"rows": "rows", "steps": "timeout", "seconds": "timeout"}.get(found.kind, "error")
        assert found.status == expected
        if found.status != "rows":
            assert found.reason and len(found.reason) < 2000 and not found.rows
        assert fingerprint(path.parent) == before
        for role in ("gold", "prediction"):
            alive = sandbox.run(victim, "SELECT COUNT(*), SUM(level) FROM players", role=role)
            assert alive.rows == ((50, 1225),), alive.reason
        return found

    return run
