"""The bundled Text2SQL domains by name, and their SQLite databases.

`load_domain("game")` is the description (`schema.Domain`), `build_database` the populated database: the same
rows for the same seed on every machine. The game domain, `db_id` 1, is held out for testing and comes first.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from quantlab.data.domain_yaml import parse_domain, read_domain
from quantlab.data.populate import Cell, rows
from quantlab.data.schema import Column, Domain, ForeignKey, Table
from quantlab.errors import DataError, MachineError
from quantlab.paths import DATA, nearest

__all__ = [
    "Cell", "Column", "Domain", "ForeignKey", "Table", "build_database", "domain_names", "load_domain",
    "parse_domain", "read_domain", "rows", "tables_ddl",
]  # fmt: skip

DOMAINS = DATA / "ko_text2sql" / "domains"


def domain_names() -> list[str]:
    """Names of the bundled domains by `db_id`: game first."""
    found = []
    for path in DOMAINS.glob("*.yaml"):
        db_id = re.search(r"^db_id:\s*(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        found.append((int(db_id.group(1)) if db_id else 10**9, path.stem))
    return [name for _, name in sorted(found)]


@cache
def load_domain(name: str) -> Domain:
    """The bundled domain of that name."""
    names = domain_names()
    if name not in names:
        near = nearest(name, names)
        raise DataError(
            f"no such domain: {name}", hint=f"did you mean {near}?" if near else "one of: " + ", ".join(names)
        )
    domain = read_domain(DOMAINS / f"{name}.yaml")
    if domain.name != name:
        raise DataError(f"{name}.yaml calls itself {domain.name}", hint="name must be the file's name")
    return domain


def tables_ddl(name: Any, tables: Any, where: str) -> str:
    """The DDL of some tables of a bundled domain, for a row (at ``where``) that names them instead of a context."""
    try:
        return _tables_ddl(str(name), tuple(tables))
    except (KeyError, TypeError, ValueError, OSError, DataError) as error:
        raise DataError(
            f"{where}: no 'context', and none can be made from 'db' and 'tables': {error}"
        ) from error


@lru_cache(maxsize=4096)
def _tables_ddl(name: str, tables: tuple[str, ...]) -> str:
    return str(load_domain(name).ddl(list(tables)))


def build_database(domain: Domain, path: Path | str, seed: int = 0) -> None:
    """Write the domain's populated SQLite database to `path`; only a complete one replaces what is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        with contextlib.closing(sqlite3.connect(temporary)) as connection:
            _fill(connection, domain, seed)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except (OSError, sqlite3.OperationalError) as error:
        raise MachineError(f"cannot write {path}: {error}", hint="is the disk full?") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _fill(connection: sqlite3.Connection, domain: Domain, seed: int) -> None:
    connection.execute("PRAGMA page_size = 4096")
    connection.execute("PRAGMA journal_mode = OFF")
    connection.executescript(domain.ddl())
    for name, cells in rows(domain, seed).items():
        marks = ", ".join("?" * len(domain.table(name).columns))
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", cells)
    broken = connection.execute("PRAGMA foreign_key_check").fetchone()
    if broken is not None:
        raise DataError(f"domain {domain.name}: table {broken[0]} points at a missing row of {broken[2]}")
    connection.commit()
