"""A SQLite file with the tables of some DDL and no rows, to see whether a query runs at all.

The DDL comes with the data and is not trusted: SQLite runs it under an authorizer that lets a new file's tables and
indexes be created and refuses everything else (ATTACH, PRAGMA, triggers, virtual tables, CREATE TABLE AS SELECT,
INSERT of rows). What SQLite does not run is answered with the reason, not raised. So is DDL that is plainly another
database's: SQLite takes `INT AUTO_INCREMENT` for the name of a type, but the queries that come with such tables may use
functions that it lacks, which would not show that they are wrong.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

MAX_DDL = 500_000  # characters
_FOREIGN = re.compile(
    r"\b(?:AUTO_INCREMENT|UNSIGNED|(?:BIG|SMALL)?SERIAL|VARCHAR2|(?:ENGINE|CHARSET)\s*=|(?:ENUM|IDENTITY)\s*\()",
    re.IGNORECASE,
)
_CREATING = frozenset(
    {
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_FUNCTION,  # in CHECK and DEFAULT: named here, run only when a row comes
        sqlite3.SQLITE_REINDEX,
        sqlite3.SQLITE_TRANSACTION,
        sqlite3.SQLITE_READ,
    }
)
_WRITING = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE})
_BOOKKEEPING = frozenset({"sqlite_master", "sqlite_sequence"})


def build_empty(ddl: str, path: Path) -> str | None:
    """Create the tables of `ddl` in the new file `path`; returns why that is not possible, or None."""
    if len(ddl) > MAX_DDL:
        return f"the DDL is longer than {MAX_DDL} characters"
    foreign = _FOREIGN.search(ddl)
    if foreign is not None:
        return f"{foreign.group()} is not SQLite's"
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        with contextlib.closing(connection):
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "trusted_schema = 0"):
                connection.execute(f"PRAGMA {pragma}")
            connection.set_authorizer(_authorize)
            connection.executescript(ddl)
            connection.set_authorizer(None)
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table'").fetchone():
                raise ValueError("the DDL creates no table")
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        path.unlink(missing_ok=True)
        return str(error) or type(error).__name__
    return None


def _authorize(
    action: int, first: str | None, second: str | None, database: str | None, inner: str | None
) -> int:
    if action in _CREATING or (action in _WRITING and first in _BOOKKEEPING):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY
