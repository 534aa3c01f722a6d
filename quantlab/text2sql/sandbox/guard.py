"""What holds a query back inside the worker: how a database is opened, the authorizer, the progress handler.

`worker.py` says what each of them is there for. Nothing here knows of pipes or requests.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sqlite3
import struct
import time
from pathlib import Path
from typing import Any

SCHEMA_BYTES = 4_000_000  # of one CREATE statement; queries have a limit of their own (`query.py`)
STRIDE = 2000  # virtual-machine steps between two looks at the clock

# Eponymous table-valued functions that read nothing but their argument.
TABLE_FUNCTIONS = frozenset({"json_each", "json_tree"})
SCHEMA_TABLES = frozenset({"sqlite_master", "sqlite_schema", "sqlite_sequence"})
# Functions that touch files, load code, hand out pointers or walk a virtual table's inside, whatever this SQLite was
# compiled with.
DENIED_FUNCTIONS = frozenset(
    {
        "load_extension", "readfile", "writefile", "edit", "fsdir", "lsmode", "readblob", "writeblob", "sqlar_compress",
        "sqlar_uncompress", "shell_exec", "crypto_decrypt", "define", "eval", "optimize",
    }
)  # fmt: skip
DENIED_PREFIXES = ("fts", "rtree", "geopoly", "sqlite_")
ALLOWED_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
# What else a statement may be refused for; where none of these, its first keyword says it (DROP, ALTER, …).
ACTION_NAMES = {
    getattr(sqlite3, f"SQLITE_{name}"): name
    for name in ("DELETE", "INSERT", "UPDATE", "PRAGMA", "ATTACH", "DETACH", "TRANSACTION", "SAVEPOINT")
}
# Text that is not UTF-8 comes through as lone surrogates. A partial of `str` is called from C, with no frame a value.
_DECODE = functools.partial(str, encoding="utf-8", errors="surrogateescape")


class Guard:
    """Authorizer and progress handler of one connection; remembers why it said no."""

    def __init__(self, tables: frozenset[str]) -> None:
        self.tables = tables
        self.denied = self.stopped = self.word = ""
        self.steps = self.max_steps = 0
        self.deadline = 0.0

    def start(self, limits: dict[str, Any], word: str, deadline: float | None = None) -> None:
        self.denied = self.stopped = ""
        self.word = word  # the statement's first keyword
        self.steps = 0
        self.max_steps = limits["steps"]
        self.deadline = time.monotonic() + limits["seconds"] if deadline is None else deadline

    def authorize(
        self, action: int, first: str | None, second: str | None, database: str | None, inner: str | None
    ) -> int:
        reason = self._refusal(action, first, second)
        if reason is None:
            return sqlite3.SQLITE_OK
        self.denied = self.denied or reason
        return sqlite3.SQLITE_DENY

    def _refusal(self, action: int, first: str | None, second: str | None) -> str | None:
        if action not in ALLOWED_ACTIONS:
            what = ACTION_NAMES.get(action, self.word or f"action {action}")
            if first in ("sqlite_master", "sqlite_temp_master"):
                if self.word in ("SELECT", "WITH", "VALUES"):
                    return "a table function or virtual table is not allowed here"  # SQLite declares it by a write
                what = self.word
            return f"{what} is not allowed here, only reading is"
        if action == sqlite3.SQLITE_FUNCTION and not self.harmless(second):
            return f"the function {second} is not allowed here"
        if action == sqlite3.SQLITE_READ and not self._readable((first or "").lower(), second or ""):
            return f"the table {first} is not part of this database"
        return None

    @staticmethod
    def harmless(function: str | None) -> bool:
        name = (function or "").lower()
        return name == "sqlite_version" or not (name in DENIED_FUNCTIONS or name.startswith(DENIED_PREFIXES))

    def _readable(self, table: str, column: str) -> bool:
        if table in self.tables or table in SCHEMA_TABLES or table in TABLE_FUNCTIONS:
            return True
        # Without a column the name may be that of a common table expression, of which SQLite asks by its alias.
        return column == "" and not table.startswith(
            ("pragma_", "sqlite_", "dbstat", "fts", "bytecode", "tables_used")
        )

    def tick(self) -> int:
        self.steps += STRIDE
        if self.steps > self.max_steps:
            self.stopped = "steps"
        elif time.monotonic() > self.deadline:
            self.stopped = "seconds"
        return 1 if self.stopped else 0


def open_database(path: str, limits: dict[str, Any]) -> sqlite3.Connection:
    """A read-only connection to a file with SQLite's own limits set; the authorizer is not on it yet.

    OSError for a file that cannot be read as it stands without writing beside it.
    """
    file = Path(path).resolve()  # what SQLite keeps beside a file stands beside the link's target
    journal, log, index = (Path(f"{file}-{suffix}") for suffix in ("journal", "wal", "shm"))
    # An immutable file needs no lock and no side file; with a journal or a log beside it that has not been written
    # back, the file alone would be out of date or half changed. SQLite then looks at both, and refuses where it would
    # have to write.
    logged, journaled = _is_log(log), _head(journal) != b""
    if logged and not index.exists():
        raise OSError(f"{log.name} beside it has not been written back; open the database once to write")
    mode = "mode=ro&readonly_shm=1" if logged or journaled else "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"{file.as_uri()}?{mode}",
        uri=True,
        timeout=limits["seconds"] / 2,  # of waiting for another program's lock
        isolation_level=None,
        cached_statements=0,
    )
    try:
        connection.execute("PRAGMA query_only = 1")
        harden(connection, limits)
        if logged or journaled:
            connection.execute("SELECT 1 FROM sqlite_master").close()
    except sqlite3.Error as error:
        connection.close()
        if not (logged or journaled):
            raise
        side = log.name if logged else journal.name
        raise OSError(f"{error}; {side} beside it may have to be written back first") from error
    return connection


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(32)
    except OSError:
        return b""


def _is_log(path: Path) -> bool:
    """Whether a write-ahead log has a valid header: SQLite ignores one that has not, or waits for it to get better.

    https://sqlite.org/fileformat2.html#walformat: a magic number that also names the byte order of the checksum's
    words, five more words, and the checksum of these six.
    """
    head = _head(path)
    order = {b"\x37\x7f\x06\x82": "<", b"\x37\x7f\x06\x83": ">"}.get(head[:4])
    if order is None or len(head) < 32:
        return False
    words = struct.unpack(f"{order}6I", head[:24])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2]):
        first = (first + even + second) % 2**32
        second = (second + odd + first) % 2**32
    return (first, second) == struct.unpack(">2I", head[24:])


def harden(connection: sqlite3.Connection, limits: dict[str, Any]) -> None:
    """SQLite's own limits and safety settings, and the table functions that are allowed."""
    connection.text_factory = _DECODE
    for pragma in ("temp_store = MEMORY", "trusted_schema = 0", "cell_size_check = 1"):
        connection.execute(f"PRAGMA {pragma}")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, limits["value_bytes"]),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, SCHEMA_BYTES),
        (sqlite3.SQLITE_LIMIT_VDBE_OP, 2_000_000),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 2_000),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 100),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1),
    ):
        connection.setlimit(limit, value)
    for function in sorted(TABLE_FUNCTIONS):  # declared at first use, which the authorizer would refuse
        with contextlib.suppress(sqlite3.OperationalError):  # compiled without it
            connection.execute(f"SELECT 1 FROM {function}('[]')").close()


def first_word(sql: str) -> str:
    """First keyword, upper case. Blanks, comments, semicolons and a byte order mark before it are what SQLite skips."""
    found = _FIRST_WORD.match(sql)
    return found.group(1).upper() if found is not None else ""


# Possessive, so that a text of nothing but comments is read once.
_FIRST_WORD = re.compile(r"(?:[ \t\n\f\r;\ufeff]|--[^\n]*+|/\*(?s:.*?)(?:\*/|\Z))*+(\w*)")
