"""The process that runs SQL nobody trusts: it can read one database file and nothing else.

Started by `quantlab.sql.sandbox` as a plain script with `python -I -S`, so it has the standard library only
and must not import the package. It speaks length-prefixed JSON (4 bytes big-endian, then UTF-8) on its
standard input and output; the first frame carries the limits, every later one a query, and the end of input
ends it.

What holds a query back, in the order it meets them:
- the file is opened read-only (`mode=ro`, `immutable=1`), a second time for gold and for prediction;
- an authorizer lets SELECT, column reads of the file's own tables, harmless functions and recursion
  through, and refuses everything else (writes, ATTACH, PRAGMA, transactions, virtual tables, extensions);
- SQLite's own limits on value size, SQL length, heap, attached files and compound queries;
- a progress handler counts virtual-machine steps and looks at the clock;
- the fetch loop counts rows and bytes;
- the operating system limits address space and forbids this process to write any file (POSIX);
- an interval timer kills this process where SQLite never comes back to the handler (POSIX), and the parent
  does the same from outside on every system.

Not covered: a bug inside SQLite itself that runs code. The process has the user's rights to read files.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import sqlite3
import struct
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

STRIDE = 2000  # virtual-machine steps between two looks at the clock
OPEN_CONNECTIONS = 16

# Eponymous table-valued functions that read nothing but their argument.
TABLE_FUNCTIONS = frozenset({"json_each", "json_tree"})
SCHEMA_TABLES = frozenset({"sqlite_master", "sqlite_schema", "sqlite_sequence"})
# Functions that touch files, load code or hand out pointers, whatever this SQLite was compiled with.
DENIED_FUNCTIONS = frozenset(
    {
        "load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "fsdir", "lsmode", "readblob",
        "writeblob", "sqlite_dbpage", "sqlar_compress", "sqlar_uncompress", "shell_exec", "crypto_decrypt", "define",
        "eval",
    }
)  # fmt: skip
ALLOWED_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
# What else a statement may be refused for; where none of these, its first keyword says it (DROP, ALTER, …).
ACTION_NAMES = {
    getattr(sqlite3, f"SQLITE_{name}"): name
    for name in ("DELETE", "INSERT", "UPDATE", "PRAGMA", "ATTACH", "DETACH", "TRANSACTION", "SAVEPOINT")
}


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message, or None at the end of input, which may cut a frame short."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack(">I", head)[0]
    body = stream.read(size)
    if len(body) < size:
        return None
    message: dict[str, Any] = json.loads(body)
    return message


def write_frame(stream: IO[bytes], message: dict[str, Any]) -> None:
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def encode_value(value: Any) -> Any:
    """Blobs have no JSON form: they travel as {"b": base64}."""
    return {"b": base64.b64encode(value).decode("ascii")} if isinstance(value, bytes) else value


def decode_value(value: Any) -> Any:
    return base64.b64decode(value["b"]) if isinstance(value, dict) else value


class Guard:
    """Authorizer and progress handler of one connection; remembers why it said no."""

    def __init__(self, tables: frozenset[str]) -> None:
        self.tables = tables
        self.denied = self.stopped = self.word = ""
        self.steps = self.max_steps = 0
        self.deadline = 0.0

    def start(self, limits: dict[str, Any], word: str) -> None:
        self.denied = self.stopped = ""
        self.word = word  # the statement's first keyword
        self.steps = 0
        self.max_steps = limits["steps"]
        self.deadline = time.monotonic() + limits["seconds"]

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
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in DENIED_FUNCTIONS:
            return f"the function {second} is not allowed here"
        if action == sqlite3.SQLITE_READ and not self._readable((first or "").lower(), second or ""):
            return f"the table {first} is not part of this database"
        return None

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


class Worker:
    """Answers queries within `limits`; keeps a few connections open, never one for both gold and prediction."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.limits = limits
        self.connections: OrderedDict[tuple[Any, ...], tuple[sqlite3.Connection, Guard]] = OrderedDict()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        key = (request["database"], request["role"], *_version(request["database"]))
        try:
            connection, guard = self._connect(key, request["database"])
        except (sqlite3.Error, OSError, MemoryError) as error:
            return _failure("database", f"cannot open the database: {error}", started, 0)
        guard.start(self.limits, _first_word(request["sql"]))
        try:
            columns, rows, failure = self._fetch(connection, request["sql"], guard)
        except (
            sqlite3.Error,
            sqlite3.Warning,
            MemoryError,
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:
            if isinstance(error, MemoryError) or guard.stopped:
                self._forget(key)
            kind, reason = self._explain(error, guard)
            return _failure(kind, reason, started, guard.steps)
        if failure is not None:
            return _failure(*failure, started, guard.steps)
        seconds = time.monotonic() - started
        return {"kind": "rows", "columns": columns, "rows": rows, "steps": guard.steps, "seconds": seconds}

    def _connect(self, key: tuple[Any, ...], path: str) -> tuple[sqlite3.Connection, Guard]:
        if key in self.connections:
            self.connections.move_to_end(key)
            return self.connections[key]
        connection = open_database(path, self.limits)
        try:
            names = connection.execute(
                "SELECT lower(name) FROM sqlite_master WHERE type IN ('table', 'view')"
            )
            guard = Guard(frozenset(str(name) for (name,) in names))
            for function in (
                "json_each",
                "json_tree",
            ):  # declared at first use, which the authorizer would refuse
                with contextlib.suppress(sqlite3.OperationalError):  # compiled without it
                    connection.execute(f"SELECT 1 FROM {function}('[]')").close()
        except BaseException:
            connection.close()
            raise
        connection.set_authorizer(guard.authorize)
        connection.set_progress_handler(guard.tick, STRIDE)
        self.connections[key] = connection, guard
        while len(self.connections) > OPEN_CONNECTIONS:
            self._forget(next(iter(self.connections)))
        return connection, guard

    def _forget(self, key: tuple[Any, ...]) -> None:
        connection, _ = self.connections.pop(key)
        connection.close()

    def _fetch(
        self, connection: sqlite3.Connection, sql: str, guard: Guard
    ) -> tuple[list[str], list[list[Any]], tuple[str, str] | None]:
        if guard.word == "EXPLAIN":
            return [], [], ("denied", "EXPLAIN is not a query on the data")
        cursor = connection.execute(sql)
        if cursor.description is None:
            cursor.close()
            if guard.word:
                return [], [], ("denied", f"{guard.word} is not a query on the data")
            return [], [], ("empty", "there is no query in the text")
        rows: list[list[Any]] = []
        size = 0
        try:
            for row in cursor:
                rows.append([encode_value(value) for value in row])
                size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
                if len(rows) > self.limits["rows"]:
                    return [], [], ("too_many_rows", f"the result has more than {self.limits['rows']} rows")
                if size > self.limits["result_bytes"]:
                    return [], [], ("size", f"the result is larger than {self.limits['result_bytes']} bytes")
            return [column[0] for column in cursor.description], rows, None
        finally:
            cursor.close()

    def _explain(self, error: BaseException, guard: Guard) -> tuple[str, str]:
        if guard.stopped == "steps":
            return "steps", f"stopped after {self.limits['steps']} steps"
        if guard.stopped == "seconds":
            return "seconds", f"stopped after {self.limits['seconds']:g} s"
        if isinstance(error, MemoryError):
            return "memory", f"more than {self.limits['memory_bytes']} bytes of memory were needed"
        if guard.denied:
            return "denied", guard.denied
        text = str(error) or type(error).__name__
        if isinstance(error, sqlite3.DataError) or "too big" in text:
            return "size", text
        if "one statement at a time" in text:
            return "several", "more than one statement"
        return "sql", text


def open_database(path: str, limits: dict[str, Any]) -> sqlite3.Connection:
    """A read-only connection with SQLite's own limits set; the authorizer is not on it yet."""
    wal = Path(path + "-wal")
    # An immutable file needs no lock and no side file; with a log beside it that has not been written back, the
    # file alone would be out of date.
    mode = "mode=ro" if wal.exists() and wal.stat().st_size else "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?{mode}", uri=True, isolation_level=None, cached_statements=0
    )
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    for pragma in ("query_only = 1", "temp_store = MEMORY", "trusted_schema = 0", "cell_size_check = 1"):
        connection.execute(f"PRAGMA {pragma}")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, limits["value_bytes"]),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits["sql_bytes"]),
        (sqlite3.SQLITE_LIMIT_VDBE_OP, 2_000_000),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 2_000),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 100),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1),
    ):
        connection.setlimit(limit, value)
    return connection


def _version(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _failure(kind: str, reason: str, started: float, steps: int) -> dict[str, Any]:
    return {"kind": kind, "reason": reason, "steps": steps, "seconds": time.monotonic() - started}


def _first_word(sql: str) -> str:
    """First keyword, upper case, comments and blanks skipped."""
    rest = sql.lstrip()
    while rest.startswith(("--", "/*")):
        end = rest.find("\n") if rest.startswith("--") else rest.find("*/", 2)
        if end < 0:
            return ""
        rest = rest[end + (1 if rest.startswith("--") else 2) :].lstrip()
    word = ""
    for char in rest:
        if not (char.isalnum() or char == "_"):
            break
        word += char
    return word.upper()


def confine(limits: dict[str, Any]) -> None:
    """Process-wide limits: SQLite's heap, and on POSIX the address space, file writes and core dumps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; the end of input ends us
    memory = sqlite3.connect(":memory:")
    memory.execute(f"PRAGMA hard_heap_limit = {int(limits['memory_bytes'])}")
    memory.close()
    try:
        import resource
    except ImportError:
        return
    space = 2 * int(limits["memory_bytes"]) + 2**29
    for name, value in (("RLIMIT_AS", space), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # not every system has every limit; the others still hold


def _set_timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> int:
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing but frames may reach the parent
    limits = read_frame(requests)
    if limits is None:
        return 0
    confine(limits)
    worker = Worker(limits)
    write_frame(answers, {"ready": True, "sqlite": sqlite3.sqlite_version})
    while (request := read_frame(requests)) is not None:
        # The default action of the timer's signal ends the process, even inside a call that never returns.
        _set_timer(2 * (limits["seconds"] + limits["grace"]))
        answer = worker.answer(request)
        _set_timer(0)
        write_frame(answers, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
